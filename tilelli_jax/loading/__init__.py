"""Opens and saves networks: model directories, Hugging Face directories, and their tokenizers."""
