"""The people and things of the built-in stories; `plots` has their wording.

The pools are plain tuples, and their order is part of the corpus: appending, removing or moving an entry
changes the generated stories (a test pins the first bytes).
"""

from __future__ import annotations

from typing import NamedTuple


class Person(NamedTuple):
    """A person's name, its pronouns and kind."""

    name: str
    he: str
    him: str
    his: str
    kind: str


def _people(names: str, he: str, him: str, his: str, kind: str) -> tuple[Person, ...]:
    return tuple(Person(name, he, him, his, kind) for name in names.split())


CHILDREN: tuple[Person, ...] = _people(
    "Ada Amina Anna Bella Carla Cleo Daisy Dina Ella Emma Fatima Fiona Gina Hana Ida Ines Julia "
    "Kira Layla Lena Lucy Maya Mina Nora Olga Pia Rosa Sara Tala Vera Yuki Zoe",
    "she", "her", "her", "girl",
) + _people(
    "Adam Ali Anton Ben Carlo Cyrus David Dario Eli Emil Felix Finn Gus Hugo Idir Ivan Jack Jonas "
    "Karim Leo Luca Max Milo Noah Omar Oscar Paul Remi Sami Theo Tom Victor",
    "he", "him", "his", "boy",
)

ELDERS: tuple[Person, ...] = tuple(Person(name, "she", "her", "her", "woman") for name in (
    "Mother", "Grandma", "Aunt Clara", "Aunt May", "Mrs. Reed",
)) + tuple(Person(name, "he", "him", "his", "man") for name in (
    "Father", "Grandpa", "Uncle Bob", "Uncle Ravi", "Mr. Stone",
))

# A hero may also be an animal, with the pronouns of the name.
CREATURES: tuple[str, ...] = (
    "fox", "bear", "mouse", "rabbit", "hedgehog", "otter", "badger", "squirrel", "goose", "cat")

PLACES: tuple[str, ...] = (
    "the park", "the river", "the beach", "the forest", "the hill", "the farm", "the meadow",
    "the old mill", "the harbor", "the orchard", "the lake", "the village green", "the bridge",
    "the duck pond", "the lighthouse", "the stream", "the castle", "the canal", "the valley",
    "the vineyard", "the playground", "the waterfall", "the windmill", "the market square")

SPOTS: tuple[str, ...] = (
    "bench", "gate", "wall", "big tree", "bush", "old cart", "rock", "fence", "hedge", "barrel",
    "straw bale", "pile of leaves", "log", "well", "stone", "wagon")

ANIMALS: tuple[str, ...] = (
    "owl", "frog", "robin", "goat", "horse", "crow", "turtle", "pony", "sheep", "duck", "donkey",
    "beetle", "snail", "swan", "dog", "hen", "deer", "butterfly", "bee", "ant")

COLOURS: tuple[str, ...] = (
    "red", "blue", "green", "yellow", "orange", "purple", "white", "black", "brown", "pink",
    "silver", "golden")

WEATHERS: tuple[str, ...] = (
    "sunny", "windy", "cloudy", "warm", "cold", "bright", "misty", "quiet", "mild", "lovely")

TIMES: tuple[str, ...] = ("morning", "afternoon", "day")

# Topics of stories. Each plot names the pool that it draws from.
TOYS: tuple[str, ...] = (
    "kite", "ball", "drum", "doll", "top", "toy boat", "teddy bear", "hat", "whistle", "umbrella",
    "wooden horse", "toy train", "marble", "book", "balloon", "yo-yo", "bucket", "flute")
BABIES: tuple[str, ...] = (
    "kitten", "puppy", "duckling", "lamb", "baby bird", "piglet", "calf", "foal", "chick", "owlet",
    "fawn", "kid goat", "young hare", "bear cub", "bat", "gosling", "mole", "field mouse")
SKILLS: tuple[str, ...] = (
    "swim", "whistle", "ride a bicycle", "climb a tree", "skate", "row a boat", "fly a kite",
    "read a map", "play the drum", "juggle", "bake bread", "dance", "tie a knot", "knit a scarf",
    "catch a fish", "paint a picture", "jump rope", "milk a cow")
FOODS: tuple[str, ...] = (
    "apple pie", "loaf of bread", "meat pie", "cherry cake", "bag of nuts", "pancake", "pear",
    "slice of cheese", "honey bun", "plate of dumplings", "basket of plums", "jar of jam", "melon",
    "rice cake", "lemon tart", "bunch of grapes", "boiled egg", "cookie")
PLANTS: tuple[str, ...] = (
    "sunflower", "pumpkin", "bean", "tomato", "rose", "carrot", "apple tree", "tulip", "strawberry",
    "pea", "cherry tree", "onion", "melon plant", "daisy", "oak", "poppy", "lemon tree", "cabbage")
GIFTS: tuple[str, ...] = (
    "scarf", "card", "necklace", "basket", "picture", "birthday cake", "paper lantern", "clay cup",
    "flower crown", "bird house", "cushion", "wooden spoon", "song book", "candle", "paper star",
    "pair of socks", "quilt", "puppet")
BREAKABLES: tuple[str, ...] = (
    "vase", "cup", "lamp", "plate", "clock", "mirror", "jar", "teapot", "bowl", "pitcher",
    "flower pot", "glass", "music box", "picture frame", "chair", "jug", "bell", "fiddle")
NOISEMAKERS: tuple[str, ...] = (
    "owl", "mouse", "loose branch", "creaky wheel", "rusty gate", "frog", "cricket",
    "dripping pipe", "hungry cat", "window shutter", "rolling bucket", "woodpecker", "hedgehog",
    "wind chime", "moth", "raccoon", "swinging lantern", "paper bag")
GAMES: tuple[str, ...] = (
    "hide and seek", "catch", "tag", "marbles", "hopscotch", "leapfrog", "chess", "football",
    "pirates", "dominoes", "cards", "kings and queens", "knights", "ring toss", "tug of war",
    "charades", "bowling", "treasure hunt")
RIDES: tuple[str, ...] = (
    "boat", "sled", "cart", "scooter", "bicycle", "raft", "canoe", "wagon", "paddle boat",
    "tricycle", "skateboard", "kayak", "rowing boat", "soapbox car", "barrel", "snow tube", "log",
    "handcart")
TREASURES: tuple[str, ...] = (
    "silver bell", "box of shells", "glass bead", "old coin", "golden ring", "music box",
    "wooden crown", "bag of buttons", "brass key", "blue stone", "compass", "tin soldier", "pearl",
    "spyglass", "letter", "painted egg", "feather pen", "set of chalk")
