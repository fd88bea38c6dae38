"""`tilelli abstention`: can a network learn to abstain when it does not know?"""
