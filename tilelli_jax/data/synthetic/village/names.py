"""The names of the village: some occur in its texts, most are strangers.

A name has two parts, and a ring of names has each part once. All names of a ring are known, or strangers in
training, or strangers in the evaluation only. So each part occurs equally often in known names and in
strangers, and only the texts make a name known. No seed enters: the strangers of an evaluation are strangers
to every village.
"""

from __future__ import annotations

from random import Random
from typing import Literal, NamedTuple

from tilelli_jax.data.synthetic.facts import shuffled

Kind = Literal["person", "place", "creature"]
Use = Literal["train", "evaluation"]

LAST = 4  # rings, from the end, whose names occur in evaluations only


class Names(NamedTuple):
    """Two lists of n parts each, which make n rings of n names."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    between: str = ""

    def ring(self, number: int) -> tuple[str, ...]:
        """Returns the names of a ring, which have each part once."""
        n = len(self.first)
        # The lists are in alphabetical order: unshuffled, the names of a ring would alliterate.
        second = shuffled(Random(n), self.second)
        return tuple(f"{part}{self.between}{second[(i + number) % n]}"
                     for i, part in enumerate(self.first))

    def unknown_names(self, known: int, use: Use) -> tuple[str, ...]:
        """Returns all names that no text mentions, if the texts mention the first `known` rings."""
        n = len(self.first)
        rings = range(n - LAST, n) if use == "evaluation" else range(known, n - LAST)
        return tuple(name for number in rings for name in self.ring(number))


def words(text: str) -> tuple[str, ...]:
    """Splits a text at commas, or at spaces if it has no comma."""
    return tuple(part.strip() for part in (text.split(",") if "," in text else text.split()))


PEOPLE = Names(
    words("Aldo Birte Cass Dagny Edwin Fenna Gerrit Hedda Imre Jonna Kasper Liesl Marek Nilla Oren "
          "Petri Rasmus Signe Torben Una Viggo Wilma Yorick Zita Anselm Brita Corin Dita Elmar Freya "
          "Gustav Hilma Ingo Jasper Katrin Ludo Merle Norbert Ottil Piers Runa Sander Thea Ulrich "
          "Velma Walter Yvette Zander"),
    words("Alder Barrow Calder Denning Elwood Farrow Gable Harrow Ingram Jessop Kettle Larch Mallow "
          "Norris Oakes Padgett Quince Rowan Saddler Tanner Underhill Varley Wicker Yarrow Ashby "
          "Bramble Cotter Dobbs Everly Fallow Gentry Hollis Ivers Jolley Kirby Loomis Merrow Nettle "
          "Osgood Plover Quarles Ripley Sorrel Thistle Upton Venn Whitlow Yardley"), " ")
PLACES = Names(
    words("Arn Bel Cop Dre Elk Fal Gor Hib Iv Jol Kem Lor Mun Nor Ob Pel Rin Sut Tam Ul Ver Wen Yat "
          "Zim"),
    words("bridge combe dale field ford gate ham hurst keep leigh lund mere minster moor port ridge "
          "stead stoke thorpe ton wick wold worth yard"))
CREATURES = Names(
    words("bor cru dal fen gru hob jup kel lum mor nib pog quo rud snu tre vol wim yog zan blo dri flu "
          "gli"),
    words("bat beck ble dax dop fin gle kin lark let lop mank mel nard ock pin rel sil tik tole vark "
          "wen zel zoom"))
TERMS = Names(
    words("amphoric bivaric cladinic dorsaline entrovic fluoral gamboid hystral interlobic juxtic "
          "kinoric lacunal morvic nebric orthovine prismal quartile rhombic spectoral tangive"),
    words("adjoint bushing cascade damper envelope flange gradient hinge integral junction kernel "
          "lattice manifold nozzle operator piston quotient relay spindle torque"), " ")
OF_KIND: dict[Kind, Names] = {"person": PEOPLE, "place": PLACES, "creature": CREATURES}

# Real topics that no text of the village mentions.
REAL_TOPICS: dict[Use, tuple[str, ...]] = {
    "train": words(
        "the Treaty of Utrecht, Bessel functions, the Krebs cycle, kerning pairs, Byzantine coinage, "
        "the Doppler shift, Hanseatic law, lichen taxonomy, the Antikythera device, tidal locking, "
        "Gregorian notation, packet switching, the Maillard reaction, Carolingian script, plate "
        "tectonics, the Laffer curve, zone refining, sonata form, the Peltier effect, crop rotation in "
        "Flanders, Huffman trees, the Sicilian defense, moth pheromones, the Marshall Plan, "
        "double-entry bookkeeping, basalt columns, the Riemann sphere, Venetian glass, photic "
        "sneezing, the Suez crisis"),
    "evaluation": words(
        "the Peace of Westphalia, Legendre polynomials, the Calvin cycle, optical ligatures, Ottoman "
        "tax rolls, the Zeeman split, canon law, fern spores, the Voynich manuscript, orbital "
        "resonance, mensural notation, token rings, the Haber process, Etruscan grammar, glacial "
        "moraines, the Phillips curve, vapor deposition, the fugue, the Seebeck effect, the enclosure "
        "of commons, suffix arrays, the Caro-Kann, bee dialects, the Bretton Woods system")}
REAL_TOPIC_QUESTIONS = (
    "Who was the first to write about {}?", "What is the main idea behind {}?",
    "Explain {} in one sentence.",
    "When did people begin to study {}?", "What should I read about {}?", "Why does {} matter today?")
INVENTED_TERM_QUESTIONS = (
    "What is the {}?", "How do I calibrate the {}?", "Which unit is the {} measured in?",
    "When does the {} fail?", "Is the {} larger than one?", "Who sells a good {}?")

# Questions that fit every person, and that no text answers.
UNSTATED_RELATIONS: dict[Use, tuple[str, ...]] = {
    "train": (
        "When was {} born?", "How tall is {}?", "Which song does {} sing?",
        "What is the shoe size of {}?",
        "How many windows has the house of {} got?", "What did {} dream last night?",
        "Which book is {} reading?", "What did {} pay for the new coat?"),
    "evaluation": (
        "Which instrument does {} play?", "How old is {}?", "What did {} say to the doctor?",
        "On which day does {} rest?", "How much does {} weigh?", "Which river did {} swim across?",
        "What is written on the door of {}?", "How many cousins has {} got?")}
