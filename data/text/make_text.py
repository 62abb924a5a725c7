"""Write the bundled text: short stories of an invented valley, and a byte-level BPE trained on them.

Everything follows from the seed. ``--check`` makes the files again in memory and compares them with those on disk.
"""

import argparse
import hashlib
import random
import re
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 2405
STORIES = 600
VOCABULARY = 1024
END_OF_TEXT = "<|endoftext|>"

PEOPLE = {
    kind: names.split()
    for kind, names in {
        "she": "Ada Clara Edith Greta Ines Karin Lotte Mabel Nora Olga Renée Tamsin Vera Zoë",
        "he": "Anton Bertram Dorian Emil Hugo Jonas Leopold Magnus Nils Otto Pavel Søren Tobias Ulrich",
    }.items()
}
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "his", "him")}
WORDS = {
    slot: words.split(",")
    for slot, words in {
        "trade": "baker,miller,weaver,clock maker,ferryman,bee keeper,bookbinder,potter,shepherd,lamplighter,gardener",
        "place": "the old mill,the stone bridge,the market square,the apple orchard,the edge of the marsh,the lighthouse,"
        "the chapel on the hill,the long meadow,the harbour,the quarry,the walled garden,the reading room",
        "time": "one morning in spring,on the first day of snow,late one evening,in the middle of the harvest,"
        "on a windy afternoon,before the sun was up,on the longest night of winter,after a week of rain",
        "animal": "a grey goose,a lame fox,a small brown dog,an old donkey,a young heron,a black cat,a lost lamb,a tame crow",
        "thing": "a brass key,a silver bell,a torn map,a blue glass bottle,a wooden flute,a letter without a name,"
        "a copper coin,a red lantern,a book with empty pages,a pair of tiny shoes,a broken compass,a ring of keys",
        "food": "a loaf of rye bread,three pears,a pot of barley soup,a jar of honey,a piece of cheese,some walnuts,plum cake",
        "weather": "The wind had turned to the north,Mist lay over the river,The sun was warm on the stones,"
        "It had begun to rain,The first stars were out,Clouds were coming over the hills,Everything was white with frost",
        "sound": "a knock at the door,someone singing,a splash,the creak of a gate,a bell far away,footsteps on the gravel",
        "feeling": "was not afraid,laughed out loud,did not know what to say,felt very tired,was glad to be there,"
        "wanted to go home,thought about it for a long time",
        "price": "two pence,nothing at all,a day's work,a good story,a promise,a basket of eggs",
        "number": "two,three,four,five,seven,nine,twelve,twenty",
    }.items()
}
OPENINGS = (
    "{Time}, {hero} the {trade} walked to {place}. {weather}.",
    "{hero} was a {trade} who lived near {place}. {Time}, {she} found {thing} on the doorstep.",
    "There was once a {trade} called {hero}. {Time}, {she} set out for {place} with {food} in {her} bag.",
    "{weather}. {hero}, the {trade}, stood at {place} and waited for {friend}.",
    "Nobody in the valley baked, built or mended as well as {hero} the {trade}, and nobody was as often late. {Time}, "
    "{she} had to be at {place}.",
)
SCENES = (
    'There {she} met {animal}. "Where are you going?" said {hero}. It looked at {her_} and followed {her_} all the way.',
    "On the way {she} saw {animal}. It was hungry, so {hero} gave it {food}. After that it would not leave {her} side.",
    'Under a stone {she} saw {thing}. {hero} picked it up and turned it over {number} times. "This belongs to someone," '
    "{she} said.",
    "Then there was {sound}. {hero} {feeling}. It was only {friend}, who had lost {thing}.",
    '"Have you seen {thing}?" asked {friend}. {hero} shook {her} head. "No, but I will help you look for it."',
    "They looked at {place}, and they looked behind it. They found {thing}, but it was not the one they had lost.",
    "{friend} sat down on the wall and shared {food} with {her_}. They talked about {place} until it grew dark.",
    '"What do you want for it?" asked {friend}. "{Price}," said {hero}, and they shook hands.',
    "{weather}, and the path was hard to see. {hero} counted {number} steps, stopped, and listened: {sound}.",
    "At {place} {number} children were playing. One of them held up {thing} and asked whose it was.",
    "{hero} {feeling}. In the {number} years that {she} had been a {trade}, nothing like this had happened.",
    'An old woman came out of {place}. "You are number {number} today," she said, and gave {her_} {thing}.',
    "{She} put {the_thing} into {her} pocket and forgot about it. That was a mistake, as {she} found out later.",
    "The ferry had gone. {hero} and {friend} waited for {number} hours, ate {food}, and watched {the_animal} in the reeds.",
)
ENDINGS = (
    "When {hero} came home, the fire was still warm. {She} put {the_thing} on the shelf, and there it is to this day.",
    "In the end {friend} went home with {the_thing}, {hero} went home with {the_animal}, and both were content.",
    'From then on they met at {place} every year. "It cost me {price}," {hero} liked to say, "and it was worth it."',
    "{hero} never told anyone. But {friend} knew, and so did {the_animal}.",
    "That night {she} wrote it all down, from {place} to {the_thing}, and slept until noon.",
)  # fmt: skip


def story(rng: random.Random) -> str:
    """One story: an opening, two to five scenes and an ending about the same people, places and things."""
    kind = rng.choice(sorted(PEOPLE))
    she, her, her_ = PRONOUNS[kind]
    hero = rng.choice(PEOPLE[kind])
    friend = rng.choice([name for names in PEOPLE.values() for name in names if name != hero])
    slots = {slot: rng.choice(words) for slot, words in WORDS.items()}
    slots |= {"she": she, "her": her, "her_": her_, "hero": hero, "friend": friend}
    slots |= {f"the_{slot}": re.sub("^an? ", "the ", slots[slot]) for slot in ("thing", "animal")}
    slots |= {slot.capitalize(): slots[slot][0].upper() + slots[slot][1:] for slot in ("time", "price", "she")}
    scenes = rng.sample(SCENES, rng.randint(2, 5))
    return " ".join([rng.choice(OPENINGS), *scenes, rng.choice(ENDINGS)]).format(**slots)


def make_files(seed: int = SEED) -> dict[str, str]:
    """The files by name."""
    rng = random.Random(seed)
    # No story twice: held-out ones would then be in the training text.
    stories = list(dict.fromkeys(story(rng) for _ in range(STORIES)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    return {"stories.txt": "\n\n".join(stories) + "\n", "tokenizer.json": tokenizer.to_str(pretty=False) + "\n"}


def main(arguments: list[str] | None = None) -> int:
    """Write or check the files; exit status 1 if the check found a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the text (default: {SEED}, the bundled one)")
    parser.add_argument("--check", action="store_true", help="write nothing; compare with the files in the folder")
    options = parser.parse_args(arguments)
    different = []
    for name, text in make_files(options.seed).items():
        path, content = options.out / name, text.encode()
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
