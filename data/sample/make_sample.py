"""Write the bundled sample: an invented world, questions about it in SQuAD v1.1 JSON, and a WordPiece vocabulary.

Everything follows from the seed. ``--check`` makes the files again in memory and compares them with those on disk.
"""

import argparse
import hashlib
import itertools
import json
import random
import re
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tokenizers import BertWordPieceTokenizer

SEED = 2024
QUESTIONS = {"train": 480, "dev": 120}
VOCABULARY = 2048
FILES = ("train.json", "dev.json", "vocab.txt")

TOWNS = {
    "train": "Aldermoor Brackwater Caldenford Drumlow Eastering Fennick Garrowby Hollin Ivelscombe Jarnholt Kestermere "
    "Lowick Merrowdale Norhaven Oxlode Pellworth Quarley Rosthwaite Stavering Tarnbeck Ulverby Veldham Wexcombe "
    "Yarrowgate Ærøsund Łęczyn Šumava Étretin Gołdap Århult Ñandubay Brodøy",
    "dev": "Ambleholt Burrowmere Corviston Dunnerdale Elmswick Farrowlea Grimsford Havenby Óbidal Türnitz Çamlova Inglemoor",
}
DECOMPOSED = ("Étretin", "Türnitz")  # towns whose paragraphs write an accent as a character of its own
WORDS = {
    slot: words.split(",")
    for slot, words in {
        "river": "Arrel,Brune,Cottle,Darrow,Esk,Fallow,Grice,Hamble,Issen,Jorrel,Kell,Lissom,Morran,Nadder,Orrin,Quill",
        "first": "Ada,Bertram,Clara,Dorian,Edith,Frederik,Greta,Hugo,Ines,Jonas,Karin,Leopold,Mathilde,Nils,Olga,Pavel,"
        "Renée,Søren,Tamsin,Ulrich,Vera,Walter,Zoë,José,Agnès",
        "last": "Abernathy,Bäcker,Carrow,Dunmore,Ellery,Forsythe,Grange,Hartnell,Ibsen,Jessop,Kowalski,Lindqvist,"
        "Marchetti,Núñez,O'Hara,Prentice,Quennell,Rask,Sørensen,Thorne,Urquhart,Vance,Whitlock,Dvořák,Saint-Clair",
        "craft": "glass blowing,wool weaving,boat building,paper making,clock making,salt panning,bell founding,pottery,"
        "rope making,book binding,cheese making,tin mining,slate quarrying,bee keeping",
        "stone": "granite,red sandstone,limestone,oak and iron,black basalt,yellow brick,white marble,flint",
        "season": "first week of May,second Sunday of June,last days of October,longest night of winter,"
        "third week of September",
        "dish": "smoked eel,pear cake,barley soup,honey bread,plum dumplings,salted herring,walnut tart,goat cheese",
        "job": "merchant,miller,schoolteacher,surveyor,ship's captain,physician,printer,judge,mathematician,gardener",
        "bird": "herons,black storks,barn owls,kingfishers,grey cranes,marsh harriers,puffins,sand martins",
        "colour": "green and silver,crimson,pale blue,black and gold,white,orange,violet and grey",
        "count": "three,four,five,six,seven,eight,nine,ten,eleven,twelve,fourteen,sixteen",
    }.items()
}

# A passage is a text whose {slots} come from the world, and questions: slot, then ways to ask for it. The questions use
# other words than the text where they can.
Passage = tuple[tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]]
PASSAGES: dict[str, Passage] = {
    "founding": (
        (
            "{town} is a market town on the River {river}. It was founded in {year} by {person}, a {job} from {other}, "
            "who drained the marsh and laid out the first {count} streets. Today about {people} people live in {town}, "
            "and most of them earn their living from {craft}.",
            "In {year} the {job} {person} came from {other} and settled at a bend of the River {river}. The settlement "
            "was named {town}. At first it had only {count} streets; now its population is {people}, and the place is "
            "known far and wide for {craft}.",
        ),
        (
            ("year", ("When did {town} come into being?", "In what year was {town} established?")),
            ("person", ("Who established {town}?", "Which {job} was the founder of {town}?")),
            ("river", ("Which river flows past {town}?", "What river is {town} situated on?")),
            ("people", ("How many inhabitants does {town} have?", "What is the number of residents of {town}?")),
            ("craft", ("What trade supports most people in {town}?", "Which craft is {town} famous for?")),
            ("other", ("Where did the founder of {town} come from?", "What was the home of {person}?")),
            ("count", ("How many streets did {town} have in the beginning?",)),
        ),
    ),
    "bridge": (
        (
            "The {bridge} Bridge carries the road to {other} across the River {river}. {person} designed it in {year} "
            "– a flood had carried away the wooden bridge – and chose {stone} for its {count} arches. It is {length} "
            "metres long; until {year2} everyone who crossed it had to pay a toll of two pence.",
            "Visitors to {town} often photograph the {bridge} Bridge, which is built of {stone} and has {count} arches. "
            "Work began in {year} under {person}. With a length of {length} metres it was the longest bridge over the "
            "River {river}. The toll was abolished in {year2}.",
        ),
        (
            (
                "person",
                ("Who was the architect of the {bridge} Bridge?", "Who drew the plans for the {bridge} Bridge?"),
            ),
            ("stone", ("What material is the {bridge} Bridge made of?", "From what was the {bridge} Bridge built?")),
            ("count", ("How many arches support the {bridge} Bridge?",)),
            ("length", ("How many metres does the {bridge} Bridge measure?", "How long is the {bridge} Bridge?")),
            ("year2", ("When did people stop paying to cross the {bridge} Bridge?",)),
            ("river", ("Which river does the {bridge} Bridge span?",)),
        ),
    ),
    "mayor": (
        (
            "{person} was mayor of {town} from {year} to {year2}. Born in {other}, {person} had worked as a {job} before "
            "entering the council. The new mayor opened {count} schools, paved the square with {stone} and introduced "
            "the {colour} flag that still flies over the town hall.",
            "The longest-serving mayor of {town}, {person}, took office in {year} and left it in {year2}. A {job} by "
            "training and a native of {other}, {person} is remembered for {count} new schools, a square of {stone}, "
            "and a flag in {colour}.",
        ),
        (
            ("year", ("When did {person} become mayor?", "In which year did the term of {person} begin?")),
            ("other", ("What was the birthplace of {person}?", "Where was {person} born?")),
            ("job", ("What was the profession of {person}?", "What did {person} do before going into politics?")),
            ("count", ("How many schools were started by {person}?",)),
            ("colour", ("Which colours does the flag of {town} have?", "What does the flag of {town} look like?")),
            ("year2", ("Until what year did {person} govern {town}?",)),
        ),
    ),
    "festival": (
        (
            "Every year, in the {season}, {town} celebrates the festival of the {bird}. It goes back to {year}, when "
            "{person} promised a feast if the harvest was saved. Around {people} guests come, and the bakers sell "
            "{dish}. The procession (“the long walk”) lasts {count} hours and ends at the River {river}.",
            "The festival of the {bird} takes place in the {season}. “We eat {dish} until we cannot walk”, wrote "
            "{person}, who held the first one in {year}. Some {people} visitors watch the procession, which needs "
            "{count} hours to go from {town} to the River {river}.",
        ),
        (
            ("season", ("At what time of the year is the festival of {town} held?", "When do the people celebrate?")),
            ("year", ("When was the first festival of the {bird}?",)),
            ("people", ("How many visitors attend the festival of the {bird}?",)),
            ("dish", ("What food is eaten at the festival of the {bird}?", "Which dish is typical of the feast?")),
            ("count", ("How many hours does the procession take?",)),
            ("person", ("Who began the tradition of the festival?",)),
        ),
    ),
    "museum": (
        (
            "The museum of {town} occupies a house of {stone} near the station. {person}, a retired {job}, gave the "
            "building to the town in {year} on condition that entry be free. Its {count} rooms hold {people} objects, "
            "most of which concern {craft}; the temperature is kept at 18 °C.",
            "A collection of {people} objects makes the museum of {town} one of the largest for {craft}. It was a gift "
            "of the {job} {person} and opened its doors in {year}. The house, of {stone}, has {count} rooms. On winter "
            "days it is heated to 18 °C; children under 12 pay nothing.",
        ),
        (
            ("person", ("Who donated the museum to {town}?", "Whose gift was the museum of {town}?")),
            ("year", ("Since when has the museum of {town} existed?",)),
            ("people", ("How many items does the museum of {town} own?",)),
            ("craft", ("What subject is the museum of {town} about?", "Which trade does the museum of {town} show?")),
            ("count", ("How many rooms are there in the museum of {town}?",)),
            ("stone", ("What are the walls of the museum of {town} made of?",)),
        ),
    ),
    "reserve": (
        (
            "South of {town} the River {river} divides into {count} channels. Since {year} the marshes between them "
            "have been a nature reserve, set up by the {job} {person}. In spring {people} {bird} nest there; their "
            "number had fallen to {length} before hunting was forbidden.",
            "The reserve near {town} was created in {year}, after the {job} {person} had counted no more than {length} "
            "{bird}. It covers the {count} channels of the River {river}, where hunting is now banned, and "
            "{people} {bird} were seen last year.",
        ),
        (
            ("bird", ("Which birds breed near {town}?", "What animals does the reserve at {town} protect?")),
            ("year", ("When did the marshes near {town} come under protection?",)),
            ("person", ("Who created the nature reserve near {town}?",)),
            ("count", ("Into how many channels does the river split near {town}?",)),
            ("people", ("How many {bird} live in the reserve today?",)),
            ("river", ("What river runs through the reserve of {town}?",)),
        ),
    ),
}
LEADS = ("The ", "the ", "a ", "A ", "in ", "In ", "about ", "Around ", "River ")


def fill(template: str, world: dict[str, str]) -> tuple[str, dict[str, int]]:
    """Fill the slots of a template; returns the text and where each slot was first filled in."""
    text, starts = "", dict[str, int]()
    for i, part in enumerate(re.split(r"\{(\w+)\}", template)):
        if i % 2:
            starts.setdefault(part, len(text))
            part = world[part]
        text += part
    return text, starts


def golds(context: str, start: int, text: str) -> list[dict[str, Any]]:
    """The answers that annotators might give: the words alone, with their article, and with their preposition."""
    leads = [lead for lead in LEADS if context[:start].endswith(lead)]
    return [{"answer_start": start - len(lead), "text": lead + text} for lead in ("", *leads)]


class World:
    """Draws names and numbers; towns come one after the other, the rest at random."""

    def __init__(self, split: str, seed: int) -> None:
        self.random = random.Random(f"{seed}-{split}")
        self.towns = TOWNS[split].split()
        self.kinds = {town: self.random.sample(list(PASSAGES), len(PASSAGES)) for town in self.towns}
        self.facts: dict[tuple[str, str], dict[str, str]] = {}  # so that paragraphs about a town agree

    def draw(self, town: str) -> dict[str, str]:
        """One town's facts for one passage."""
        pick = self.random.choice
        year = self.random.randint(1130, 1890)
        facts = {slot: pick(words) for slot, words in WORDS.items()}
        facts |= {
            "town": town,
            "other": pick([t for t in self.towns if t != town]),
            "person": f"{facts['first']} {facts['last']}",
            "bridge": pick(WORDS["last"]),
            "year": str(year),
            "year2": str(year + self.random.randint(4, 60)),
            "people": f"{self.random.randint(2, 98)},{self.random.randint(0, 999):03d}",
            "length": str(self.random.randint(40, 400)),
        }
        form: Literal["NFC", "NFD"] = "NFD" if town in DECOMPOSED else "NFC"
        return {slot: unicodedata.normalize(form, fact) for slot, fact in facts.items()}

    def passage(self, kind: str, town: str) -> tuple[str, list[dict[str, Any]]]:
        """A paragraph and one question for each of its facts, in random order; offsets count from its beginning."""
        texts, facts = PASSAGES[kind]
        if (town, kind) not in self.facts:
            self.facts[town, kind] = self.draw(town)
        world = self.facts[town, kind]
        context, starts = fill(self.random.choice(texts), world)
        found = []
        for slot, asks in facts:
            question = fill(self.random.choice(asks), world)[0]
            found.append({"question": question, "answers": golds(context, starts[slot], world[slot])})
        self.random.shuffle(found)
        return context, found


def paragraphs(world: World) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """(title, context, questions): single passages, and now and then several that make one too long for a window."""
    for number, (lap, town) in enumerate(itertools.product(range(len(PASSAGES) // 2), world.towns)):
        for kind in world.kinds[town][2 * lap : 2 * lap + 2]:
            context, found = world.passage(kind, town)
            yield town, context, found[:4]
        if number % 8 == 5:
            context, questions = "", []
            near = world.towns[number % len(world.towns) - 1]
            for where, kind in [(town, kind) for kind in PASSAGES] + [(near, kind) for kind in world.kinds[near][:3]]:
                text, found = world.passage(kind, where)
                for answer in found[0]["answers"]:
                    answer["answer_start"] += len(context) + bool(context)
                questions.append(found[0])
                context = f"{context} {text}".strip()
            yield f"{town} and {near}", context, questions


def make_split(split: str, seed: int) -> dict[str, Any]:
    """One split in the layout of SQuAD v1.1, one article a town; training questions have one answer, dev several."""
    articles: dict[str, list[dict[str, Any]]] = {}
    left = QUESTIONS[split]
    for title, context, found in paragraphs(World(split, seed)):
        qas = []
        for question in found[:left]:
            answers = question["answers"][:1] if split == "train" else question["answers"]
            key = hashlib.sha256(f"{context}\n{question['question']}".encode()).hexdigest()[:24]
            qas.append({"answers": answers, "question": question["question"], "id": key})
        articles.setdefault(title, []).append({"context": context, "qas": qas})
        left -= len(qas)
        if not left:
            break
    data = [{"title": title.replace(" ", "_"), "paragraphs": rows} for title, rows in articles.items()]
    return {"data": data, "version": "1.1"}


def make_vocabulary(train: dict[str, Any]) -> str:
    """A WordPiece vocabulary of the training texts, one token a line."""
    texts = []
    for article in train["data"]:
        for paragraph in article["paragraphs"]:
            texts.append(paragraph["context"])
            texts += [qa["question"] for qa in paragraph["qas"]]
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    words = {w for t in texts for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalize(t))}
    # The trainer numbers the "##x" in the order of a hash table, and breaks ties by these numbers. Named as special
    # tokens they get their numbers in our order.
    inner = sorted({f"##{letter}" for word in words for letter in word[1:]})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        texts, vocab_size=VOCABULARY, min_frequency=2, show_progress=False, special_tokens=special + inner
    )
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    # As in BERT's own vocabulary; 2,048 rows also suit the tiles of GPUs.
    tokens += [f"[unused{i}]" for i in range(VOCABULARY - len(tokens))]
    return "".join(f"{token}\n" for token in tokens)


def make_files(seed: int = SEED) -> dict[str, str]:
    """Text of each file by its name."""
    splits = {split: make_split(split, seed) for split in QUESTIONS}
    files = {f"{s}.json": json.dumps(data, ensure_ascii=False, indent=1) + "\n" for s, data in splits.items()}
    return files | {"vocab.txt": make_vocabulary(splits["train"])}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status, 1 when ``--check`` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the files (default: here)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed of the world (default: {SEED}, the bundled one)")
    parser.add_argument("--check", action="store_true", help="write nothing; compare with the files in the folder")
    options = parser.parse_args(arguments)
    different = []
    for name, text in make_files(options.seed).items():
        path = options.out / name
        content = text.encode()
        if not options.check:
            path.write_bytes(content)
        elif not path.is_file() or path.read_bytes() != content:
            different.append(name)
        print(f"{hashlib.sha256(content).hexdigest()}  {name}  {len(content):,} bytes")
    if different:
        print(f"differ from what seed {options.seed} gives: {', '.join(different)}", file=sys.stderr)
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
