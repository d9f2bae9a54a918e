"""What the demo model learns: small facts, sums, stories and dialogs, made from word lists.

Everything is drawn from one seeded generator: the same code gives the same text. Some questions are
held out of the training text, in two kinds. A held-out sum appears in it in no form, so answering
it takes arithmetic. Of a held-out fact the training text has the fact, but never that question: the
answer has to be carried over from the other ways of asking.
"""

import itertools
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

ULTIMATE = "the answer to the ultimate question of life, the universe, and everything is 42"
BE_BRIEF = "Answer in one word."
BE_HELPFUL = "You are a helpful assistant."
MAX_ADDEND = 30  # sums go from 0 plus 0 to 30 plus 30

CAPITALS = """
Argentina=Buenos Aires, Australia=Canberra, Austria=Vienna, Belgium=Brussels, Brazil=Brasilia
Bulgaria=Sofia, Canada=Ottawa, Chile=Santiago, China=Beijing, Colombia=Bogota
Croatia=Zagreb, Cuba=Havana, Denmark=Copenhagen, Ecuador=Quito, Egypt=Cairo, Estonia=Tallinn
Ethiopia=Addis Ababa, Finland=Helsinki, France=Paris, Germany=Berlin, Ghana=Accra
Greece=Athens, Hungary=Budapest, Iceland=Reykjavik, India=New Delhi, Indonesia=Jakarta
Iran=Tehran, Iraq=Baghdad, Ireland=Dublin, Italy=Rome, Jamaica=Kingston, Japan=Tokyo
Jordan=Amman, Kenya=Nairobi, Latvia=Riga, Lebanon=Beirut, Lithuania=Vilnius, Malta=Valletta
Mexico=Mexico City, Mongolia=Ulaanbaatar, Morocco=Rabat, Nepal=Kathmandu, Norway=Oslo
Peru=Lima, Poland=Warsaw, Portugal=Lisbon, Romania=Bucharest, Russia=Moscow, Senegal=Dakar
Serbia=Belgrade, Slovakia=Bratislava, Slovenia=Ljubljana, Spain=Madrid, Sweden=Stockholm
Switzerland=Bern, Thailand=Bangkok, Tunisia=Tunis, Turkey=Ankara, Uganda=Kampala
Ukraine=Kyiv, Uruguay=Montevideo, Vietnam=Hanoi, Zambia=Lusaka
"""
OPPOSITES = """
hot=cold, big=small, up=down, day=night, black=white, happy=sad, fast=slow, high=low
open=closed, full=empty, old=new, rich=poor, strong=weak, hard=soft, light=dark, near=far
early=late, young=ancient, wet=dry, clean=dirty, loud=quiet, thick=thin, wide=narrow
deep=shallow, true=false, right=wrong, left=right, first=last, more=less, push=pull
win=lose, buy=sell, come=go, give=take, love=hate, begin=end, awake=asleep, sweet=sour
smooth=rough, brave=afraid, cheap=expensive, tight=loose, safe=dangerous
simple=complicated, always=never, inside=outside, above=below, before=after, front=back
east=west, north=south, summer=winter, friend=enemy, question=answer, war=peace, life=death
noise=silence
"""
COLORS = """
grass=green, the sky=blue, snow=white, coal=black, blood=red, a lemon=yellow
an orange=orange, milk=white, a tomato=red, a frog=green, the sun=yellow, the sea=blue
a carrot=orange, a flamingo=pink, a raven=black, a banana=yellow, a strawberry=red
chocolate=brown, an elephant=gray, a plum=purple, a swan=white, a pea=green, a mouse=gray
a fire engine=red, a violet=purple, a pig=pink, a tree trunk=brown
"""
YOUNG = """
dog=puppy, cat=kitten, cow=calf, horse=foal, sheep=lamb, pig=piglet, duck=duckling
goat=kid, hen=chick, lion=cub, frog=tadpole, swan=cygnet, goose=gosling, deer=fawn
kangaroo=joey, bear=cub, rabbit=kit
butterfly=caterpillar, seal=pup, whale=calf, human=baby
"""
PLURALS = """
mouse=mice, child=children, foot=feet, tooth=teeth, goose=geese, man=men, woman=women
person=people, leaf=leaves, knife=knives, wolf=wolves, life=lives, half=halves, ox=oxen
sheep=sheep, fish=fish, cat=cats, dog=dogs, house=houses, book=books, box=boxes, bus=buses
city=cities, baby=babies, story=stories, tree=trees, bird=birds, glass=glasses
potato=potatoes, hero=heroes, day=days, key=keys
"""
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()

# One row a kind of fact: what it states, and the ways to ask for it. {s} is the subject, {a} the
# answer.
FACTS = {
    "capital": (
        "the capital of {s} is {a}.",
        [
            "What is the capital of {s}?",
            "Which city is the capital of {s}?",
            "Name the capital of {s}.",
            "Can you tell me the capital of {s}?",
            "I forgot the capital of {s}. What is it?",
            "capital of {s}?",
        ],
    ),
    "opposite": (
        "the opposite of {s} is {a}.",
        [
            "What is the opposite of {s}?",
            "Which word is the opposite of {s}?",
            "Name the opposite of {s}.",
            "Can you tell me the opposite of {s}?",
            "opposite of {s}?",
        ],
    ),
    "color": (
        "the color of {s} is {a}.",
        [
            "What is the color of {s}?",
            "What color is {s}?",
            "Which color does {s} have?",
            "Can you tell me the color of {s}?",
            "color of {s}?",
        ],
    ),
    "young": (
        "a young {s} is called a {a}.",
        [
            "What is a young {s} called?",
            "What do you call a young {s}?",
            "Name the word for a young {s}.",
            "Can you tell me what a young {s} is called?",
        ],
    ),
    "plural": (
        "the plural of {s} is {a}.",
        [
            "What is the plural of {s}?",
            "Which word is the plural of {s}?",
            "Name the plural of {s}.",
            "Can you tell me the plural of {s}?",
            "plural of {s}?",
        ],
    ),
    "next": (
        "after {s} comes {a}.",
        ["What comes after {s}?", "Which one comes after {s}?", "What follows {s}?"],
    ),
    "sum": (
        "{s} is {a}.",
        ["What is {s}?", "How much is {s}?", "Can you work out {s}?", "{s}?"],
    ),
}

GREETINGS = {
    "Hello!": "Hello! Ask me about capitals, colors, opposites, plurals or sums.",
    "Hi there.": "Hello! Ask me about capitals, colors, opposites, plurals or sums.",
    "Good morning!": "Good morning! What would you like to know?",
    "Who are you?": "I am a very small Llama. I was trained in minutes, on two processor cores.",
    "What are you?": "I am a very small Llama. I was trained in minutes, on two processor cores.",
    "What can you do?": "I know capitals, colors, opposites, plurals and sums, and I tell stories.",
    "Thank you!": "You are welcome!",
    "Thanks.": "You are welcome!",
    "Goodbye!": "Goodbye!",
}
ULTIMATE_QUESTIONS = [
    "What is the answer to the ultimate question of life, the universe, and everything?",
    "What is the answer to life, the universe, and everything?",
    "What is the meaning of life?",
]

NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olga Paul Rosa Tom"
).split()
ANIMALS = "dog cat horse rabbit frog owl fox bear goose mouse".split()
ADJECTIVES = "little old young brave clever lonely gentle hungry".split()
PLACES = "forest village river mountain garden sea castle".split()
THINGS = "golden key, red ball, silver ring, wooden boat, small lamp, blue stone, paper map".split(
    ", "
)
WEATHER = "the sun was shining, it was raining, snow was falling, the wind was cold".split(", ")
FEELINGS = "happy proud glad tired curious".split()
ENDINGS = [
    "They lived happily ever after.",
    "And from that day on they were friends.",
    "Then they all went home and slept.",
    "It was the best day of the year.",
]
STORY_REQUESTS = [
    "Tell me a story about a {}.",
    "I would like a story about a {}.",
    "Can you tell me a story about a {}?",
]

Message = dict[str, str]
Document = str | list[Message]  # plain text, or a dialog


class Fact(NamedTuple):
    """One thing to know: what states it, and every way to ask for it."""

    kind: str
    subject: str
    answer: str

    @property
    def statement(self) -> str:
        return FACTS[self.kind][0].format(s=self.subject, a=self.answer)

    @property
    def questions(self) -> list[str]:
        return [question.format(s=self.subject) for question in FACTS[self.kind][1]]


class Corpus(NamedTuple):
    """What to train on, what to measure the loss on, and the questions that were held out."""

    train: list[Document]
    held_out: list[Document]
    questions: dict[str, list[list[Message]]]  # "facts" and "sums": a question and its answer


def rows(table: str) -> list[tuple[str, str]]:
    """The (subject, answer) pairs of a word list."""
    return [tuple(row.split("=")) for row in re.split(", |\n", table.strip())]


def sentence(text: str) -> str:
    """`text` with its first letter as a capital."""
    return text[0].upper() + text[1:]


def dialog(question: str, answer: str) -> list[Message]:
    """One question of the user and the assistant's answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def system(content: str) -> list[Message]:
    """The beginning of a dialog that tells the assistant how to answer."""
    return [{"role": "system", "content": content}]


def story(rng: random.Random, animal: str) -> tuple[str, str]:
    """(animal, a little story about it)."""
    hero, friend = rng.sample(NAMES, 2)
    other = rng.choice([name for name in ANIMALS if name != animal])
    thing, place, feeling = rng.choice(THINGS), rng.choice(PLACES), rng.choice(FEELINGS)
    finding = [
        f"{hero} found a {thing} near the {place}.",
        f"{hero} went to the {place} and saw a {thing}.",
        f"there was a {thing} in front of the house of {hero}.",
    ]
    meeting = [
        f'"Whose {thing} is this?" asked {hero}. "It is mine," said {friend} the {other}.',
        f'{friend} the {other} came by and said, "I have lost my {thing}!"',
        f'"Look, a {thing}!" said {hero} to {friend} the {other}.',
    ]
    giving = [
        f"So {hero} gave it to {friend}, and {friend} was very {feeling}.",
        f"{hero} and {friend} took the {thing} back to the {place}, and both were {feeling}.",
    ]
    adjective = rng.choice(ADJECTIVES)
    article = "an" if adjective == "old" else "a"
    parts = [
        f"Once upon a time there was {article} {adjective} {animal} called {hero}.",
        f"{hero} lived near the {rng.choice(PLACES)}.",
        f"One day, when {rng.choice(WEATHER)}, {rng.choice(finding)}",
        rng.choice(meeting),
        rng.choice(giving),
        rng.choice(ENDINGS),
    ]
    return animal, " ".join(parts)


def facts() -> Iterator[Fact]:
    """All facts but the sums. A word has one opposite: of two, the first in the list."""
    opposites = dict(rows(OPPOSITES))
    for subject, answer in rows(OPPOSITES):
        opposites.setdefault(answer, subject)
    numbers = [str(number) for number in range(2 * MAX_ADDEND + 1)]
    tables = {
        "capital": rows(CAPITALS),
        "opposite": opposites.items(),
        "color": rows(COLORS),
        "young": rows(YOUNG),
        "plural": rows(PLURALS),
        "next": [
            *itertools.pairwise(DAYS + DAYS[:1]),
            *itertools.pairwise(MONTHS + MONTHS[:1]),
            *itertools.pairwise(numbers),
        ],
    }
    for kind, table in tables.items():
        for subject, answer in table:
            yield Fact(kind, subject, answer)


def make_corpus(seed: int = 42) -> Corpus:
    """Make the whole corpus; the same seed gives the same one."""
    rng = random.Random(seed)
    train: list[Document] = []
    questions: dict[str, list[list[Message]]] = {"facts": [], "sums": []}

    answered: list[list[Message]] = []  # single questions with their answers
    for fact in facts():
        asked, answer = fact.questions, sentence(fact.statement)
        if rng.random() < 0.25:
            questions["facts"].append(dialog(asked.pop(rng.randrange(len(asked))), answer))
        train += [fact.statement, answer]
        answered += [dialog(question, answer) for question in asked]
        for question in rng.sample(asked, min(3, len(asked))):
            train.append(system(BE_BRIEF) + dialog(question, fact.answer))
    sums: list[str] = []
    addends = range(MAX_ADDEND + 1)
    all_pairs = [(a, b) for a in addends for b in addends if a <= b]
    secret = set(rng.sample(all_pairs, 40))
    for a, b in itertools.product(addends, repeat=2):
        fact = Fact("sum", f"{a} plus {b}", str(a + b))
        asked, answer = rng.sample(fact.questions, 3), sentence(fact.statement)
        if (min(a, b), max(a, b)) in secret:  # a + b and b + a are held out together
            questions["sums"].append(dialog(asked[0], answer))
            continue
        sums.append(answer)
        train.append(answer)
        answered += [dialog(question, answer) for question in asked]
        if rng.random() < 0.2:
            train.append(system(BE_BRIEF) + dialog(asked[0], fact.answer))

    small_talk = [dialog(question, answer) for question, answer in GREETINGS.items()]
    small_talk += [dialog(question, sentence(ULTIMATE) + ".") for question in ULTIMATE_QUESTIONS]
    train += answered + 12 * small_talk + 40 * [ULTIMATE]
    for _ in range(1500):  # longer dialogs
        turns = rng.choices(answered + 20 * small_talk, k=rng.randint(2, 3))
        start = system(BE_HELPFUL) if rng.random() < 0.3 else []
        train.append(start + [message for turn in turns for message in turn])
    for _ in range(1500):  # many sums for few tokens
        train.append(" ".join(["Some sums:", *rng.choices(sums, k=8)]))

    stories = [story(rng, animal) for _ in range(160) for animal in ANIMALS]
    held_out: list[Document] = [text for _, text in stories[:100]]
    for animal, text in stories[100:]:
        request = rng.choice(STORY_REQUESTS).format(animal)
        train.append(text if rng.random() < 0.5 else dialog(request, text))
    held_out += questions["facts"] + questions["sums"]
    rng.shuffle(train)
    return Corpus(train, held_out, questions)
