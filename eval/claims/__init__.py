"""`tilelli claims`: checks published claims about a chat model."""
