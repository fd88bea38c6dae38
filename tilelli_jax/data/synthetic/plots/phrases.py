"""What every story shares: words that vary, asides, openings and endings."""

from __future__ import annotations

from tilelli_jax.data.synthetic.plots.layout import Beat, paragraphs

# Drawn anew at each use; what is fixed for a story (names, places, colors) is in `stories.py`.
PHRASES: dict[str, tuple[str, ...]] = {
    "said": ("said", "said", "answered"),
    "cried": ("cried", "called", "shouted", "said"),
    "walked": ("walked", "went", "ran", "hurried", "skipped"),
    "looked": ("looked", "searched", "peeked", "felt around"),
    "smiled": ("smiled", "laughed", "nodded", "grinned"),
    "happy": ("happy", "glad", "cheerful", "proud"),
    "sad": ("sad", "upset", "unhappy", "worried"),
    "afraid": ("afraid", "scared", "frightened", "nervous"),
    "nice": ("kind", "sweet", "clever", "gentle", "brave", "funny", "quiet", "curious"),
    "good": ("good", "fine", "lovely", "wonderful"),
    "big": ("big", "large", "great", "huge"),
    "little": ("little", "small", "tiny"),
    "slowly": ("slowly", "carefully", "quietly", "very gently"),
    "quickly": ("quickly", "at once", "right away", "as fast as could be"),
    "Soon": ("Soon", "Before long", "After a while", "A little later", "In no time"),
    "soon": ("soon", "before long", "after a while", "bit by bit"),
    "Suddenly": ("Suddenly", "All at once", "Just then", "At that moment", "Then"),
    "Yes": ("Yes", "Of course", "All right", "Sure", "Good idea", "With pleasure"),
    "Oh_no": ("Oh no", "Oh dear", "Oh my", "Goodness"),
    "Hello": ("Hello", "Good day", "Hi there", "Hello there"),
}

# What may be said beside any plot, by day and by night, inside and outside.
ASIDES: Beat = (
    "Far away {an_animal} made a noise.",
    "A {paint} leaf came down from above.",
    "Somewhere a bell rang {number} times.",
    "The air smelled of rain.",
    "The air smelled of fresh bread.",
    "{An_animal} was the only one who saw it.",
    "{hero} took a deep breath.",
    "{hero} counted to {number}.",
    "{hero} pulled up {his} {paint} socks.",
    "For a moment it was very quiet.",
    "{hero} looked over at the {spot}.",
    "{hero} had to think of {elder}.",
    "It was just like in a song that {elder} used to sing.",
    "And what do you think came next?",
    "{hero} scratched {his} nose.",
    "That made {hero} think.",
)

OPENING = paragraphs("""
Once upon a time there was a {little} {kind} named {hero}.
There once was a {nice} {kind} called {hero}.
{hero} was a {nice} {kind} with {a_paint} coat.
In a {little} house with {a_paint} roof lived {a_kind} named {hero}.
A long time ago there lived a {nice} {kind}, and {his} name was {hero}.
This is a story about {hero}, a {nice} {kind}.
Everybody knew {hero}, the {nice} {kind} with the {paint} boots.

{He} lived with {elder} in a house with {a_paint} door.
{He} liked to sing, and {he} liked to help {elder}.
{elder} always said that {hero} had a {good} heart.
Every day {he} had breakfast with {elder} and then went out to play.
{He} could not sit still, and {he} asked about everything.
{He} had a {big} family, and {elder} told {him} a story every night.
-
""")

ENDING = paragraphs("""
{hero} told the story again and again.
That night {hero} fell asleep with a smile.
At bedtime {hero} and {elder} talked about it once more.
In the evening {elder} gave {him} a {big} hug.
{elder} was {happy} too, and they had warm milk before bed.
The stars came out, and {hero} went to bed {happy}.
And {hero} never forgot it.
It had been a {good} day.
It was the best day of the whole year, {hero} thought.
And if you go to {place}, you may still meet {him} there.
""")
