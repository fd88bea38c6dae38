"""The browser page of `tilelli recall app`: server, request queue, handlers, charts and layout."""
