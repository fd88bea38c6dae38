"""What a run trains: text, chat pairs or an autoencoder, each with its loss."""
