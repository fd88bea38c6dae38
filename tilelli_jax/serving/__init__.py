"""The HTTP server of `tilelli serve`: requests in the manner of OpenAI's API, and their replies."""
