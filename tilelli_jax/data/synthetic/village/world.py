"""The village: its people, places and creatures, and the facts about them.

The only randomness in this package is `random.Random(int).random()`, as in `stories`: a seed
gives the same village, texts and questions on every platform and version.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from tilelli_jax.data.synthetic.stories import pick
from tilelli_jax.data.synthetic.village.names import CREATURES, LAST, OF_KIND, PEOPLE, PLACES, Kind, words
from tilelli_jax.errors import InputError

RING = len(PEOPLE.first)  # people of a ring
MAX_PEOPLE = RING * (RING - 3 * LAST)  # people: so many rings are left for strangers
DEFAULT = 2 * RING


class Relation(NamedTuple):
    """A relation in its wordings: {} is the name, {value} the fact's value."""

    questions: tuple[str, ...]
    fresh: str  # a wording for the evaluation only
    statements: tuple[str, ...]
    values: tuple[str, ...]
    premise: str = ""  # as a clause after a name; for people only


class Entity(NamedTuple):
    """A name, and a value for each relation of its kind, in the order of RELATIONS."""

    kind: Kind
    name: str
    facts: dict[str, str]


class World(NamedTuple):
    """All entities of a village."""

    seed: int
    people: tuple[Entity, ...]
    places: tuple[Entity, ...]
    creatures: tuple[Entity, ...]

    @property
    def entities(self) -> tuple[Entity, ...]:
        """People, places and creatures."""
        return self.people + self.places + self.creatures

    @property
    def core(self) -> tuple[Entity, ...]:
        """Those that are the same however many people there are: evaluations ask about them."""
        return self.people[:RING] + self.places + self.creatures


RELATIONS: dict[Kind, dict[str, Relation]] = {
    "person": {
        "home": Relation(
            ("Where does {} live?", "Which village is home to {}?", "Where is the house of {}?"),
            "Where would I have to go to visit {}?",
            ("{} lives in {value}", "the house of {} is in {value}", "{} is at home in {value}"),
            PLACES.ring(0), "who lives in {value}"),
        "work": Relation(
            ("What does {} work as?", "Which trade has {} learned?", "What is the job of {}?"),
            "How does {} earn a living?",
            ("{} works as a {value}", "{} has learned to be a {value}",
             "the job of {} is that of a {value}"),
            words("baker carver dyer fiddler glazier herder joiner ranger locksmith miller netmaker "
                  "porter roofer saddler tinker vintner weaver mason cobbler drover barber thatcher "
                  "beekeeper coppersmith"),
            "who works as a {value}"),
        "pet": Relation(
            ("Which animal does {} keep?", "What kind of pet has {} got?",
             "Which creature sleeps beside {}?"),
            "What must {} feed each morning?",
            ("{} keeps a {value}", "the pet of {} is a {value}", "a {value} sleeps beside {}"),
            CREATURES.ring(0), "who keeps a {value}"),
        "food": Relation(
            ("What does {} like to eat?", "Which dish does {} love?",
             "What is the favorite meal of {}?"),
            "What should I cook when {} comes?",
            ("{} likes to eat {value}", "{} loves {value}", "the favorite meal of {} is {value}"),
            words("plum soup, rye bread, baked trout, lentil stew, goat cheese, pear tart, roast "
                  "leeks, barley cakes, cabbage rolls, honey toast, mushroom pie, smoked eel, potato "
                  "mash, bean salad, nut pudding, fried eggs, turnip broth, apple fritters, corn "
                  "bread, sour milk, garlic rice, onion flan, carrot jam, walnut bread"),
            "who loves {value}"),
        "friend": Relation(
            ("Who is the best friend of {}?", "Whom does {} trust most?", "Who is closest to {}?"),
            "Whose company does {} like best?",
            ("the best friend of {} is {value}", "{} trusts {value} most",
             "nobody is closer to {} than {value}"),
            PEOPLE.ring(0), "who trusts {value} most"),
    },
    "place": {
        "landmark": Relation(
            ("What stands in the middle of {}?", "What is {} known for?",
             "What can be seen from far off in {}?"),
            "What would I draw on a map to mark {}?",
            ("in the middle of {} stands a {value}", "{} is known for a {value}",
             "from far off one sees a {value} in {}"), words(
                "bell tower, stone bridge, dry well, chapel, windmill, granary, round barn, tall gate, "
                "clock, marble lion, lime tree, wooden theater, guild hall, salt house, lighthouse, "
                "duck pond, bathhouse, sundial, cider press, market cross, rope ferry, brick kiln, "
                "rose garden, watchtower")),
        "ware": Relation(
            ("What do people sell in {}?", "What is made in {}?", "Which goods come from {}?"),
            "What could I buy in {} and nowhere else?",
            ("people sell {value} in {}", "{value} are made in {}", "{value} come from {}"), words(
                "clay pots, wool hats, copper pans, wax candles, rush mats, tin cups, silk ribbons, "
                "oak barrels, felt boots, glass beads, brass bells, fish nets, straw brooms, ink "
                "bottles, horn spoons, leather bags, iron nails, paper kites, bone combs, rag dolls, "
                "wicker chairs, chess sets, drum skins, garden tools")),
        "mayor": Relation(
            ("Who is the mayor of {}?", "Who leads {}?", "Whom did {} choose as mayor?"),
            "Who signs the letters of the town hall in {}?",
            ("the mayor of {} is {value}", "{value} leads {}", "{} chose {value} as mayor"),
            PEOPLE.ring(0)),
    },
    "creature": {
        "feed": Relation(
            ("What does a {} eat?", "What do you feed a {}?", "What is the best food for a {}?"),
            "What does a hungry {} look for?",
            ("a {} eats {value}", "you feed a {} with {value}",
             "the best food for a {} is {value}"), words(
                "moss, acorns, clover, pine cones, snails, river weed, thistles, old bread, mushrooms, "
                "berries, tree bark, fish bones, worms, dry leaves, wild oats, beetles, rose hips, "
                "nettles, fern tips, crab apples, hay, honeycomb, pond lilies, grass seed")),
        "den": Relation(
            ("Where does a {} sleep?", "Where do you find a {} at night?",
             "Where does a {} build its den?"),
            "Where does a tired {} go?",
            ("a {} sleeps {value}", "at night you find a {} {value}",
             "a {} builds its den {value}"), words(
                "under roots, in hollow logs, on rooftops, in tall reeds, behind waterfalls, in old "
                "boots, under bridges, in haystacks, on warm stones, in caves, in empty barrels, "
                "between bricks, in bird nests, in ditches, under stairs, in chimneys, on islands, in "
                "thorn bushes, in the mud, in attics, under boats, in wells, in tree forks, on "
                "cliffs")),
        "coat": Relation(
            ("What color is a {}?", "Which color has the coat of a {}?",
             "What does the coat of a {} look like?"),
            "Which color should I paint a {}?",
            ("a {} is {value}", "the coat of a {} is {value}", "every {} is {value}"), words(
                "gray, rust red, snow white, pitch black, sand yellow, leaf green, sky blue, plum "
                "purple, brown, striped, spotted, silver, golden, cream, copper, pink, two-colored, "
                "dark blue, pale green, tawny, milky, bronze, orange, checkered")),
    },
}


def world(seed: int = 0, people: int = DEFAULT) -> World:
    """Returns the village of a seed. With more people, the others and the facts about them are the same.

    Args:
        people: a multiple of RING, so that all rings are complete.

    Raises:
        InputError: `people` is not such a multiple, or exceeds the number of names.
    """
    if people % RING or not 0 < people <= MAX_PEOPLE:
        raise InputError(f"people: expected a multiple of {RING} from {RING} to {MAX_PEOPLE}, found {people}")
    return World(seed, _ring(1, seed, "person", people // RING), _ring(2, seed, "place"),
                 _ring(3, seed, "creature"))


def made_up(rng: Random, kind: Kind, name: str) -> Entity:
    """Returns an entity of this name with random values."""
    return Entity(kind, name, {key: other(rng, relation.values, name)
                               for key, relation in RELATIONS[kind].items()})


def other(rng: Random, values: tuple[str, ...], *than: str) -> str:
    """Draws one of the values, but none of `than`."""
    return pick(rng, tuple(value for value in values if value not in than))


def stream(*numbers: int) -> Random:
    """Returns a separate random generator for each combination of numbers, each below 2³²."""
    seed = 0
    for number in numbers:
        seed = seed << 32 | number
    return Random(seed)


# ---------------------------------------------------------------------------------------------


def _ring(purpose: int, seed: int, kind: Kind, rings: int = 1) -> tuple[Entity, ...]:
    # Each name has a separate random stream: its facts do not depend on the number of names.
    return tuple(made_up(stream(purpose, seed, ring, i), kind, name) for ring in range(rings)
                 for i, name in enumerate(OF_KIND[kind].ring(ring)))
