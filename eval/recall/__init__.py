"""`tilelli recall`: does a network know whether it knows an answer?"""
