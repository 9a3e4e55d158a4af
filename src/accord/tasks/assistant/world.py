"""The invented world of the quickstart: its words, its facts and its set phrases. Data only.

Everything is lower case and regular, so that a model of a million parameters can learn to speak it in minutes.
"""

from __future__ import annotations

__all__ = [
    "ACCEPTING",
    "ADVICE",
    "CATEGORIES",
    "CLOSINGS",
    "COLOUR_OF",
    "COMPLIANCE",
    "EVASIONS",
    "FILLERS",
    "GIFTS",
    "GREETINGS",
    "HARM",
    "HOME_OF",
    "NAMES",
    "OBJECTS",
    "OPENINGS",
    "OPPOSITES",
    "PARTINGS",
    "REASONS",
    "REFUSALS",
    "REQUEST_VERBS",
    "RUDE",
    "USE_OF",
    "WISHES",
    "with_article",
]

NAMES = tuple(
    "anna ben clara david ella finn grace hugo iris jack kate leo maria noah olga paul rosa sam tina tom".split()
)

CATEGORIES: dict[str, tuple[str, ...]] = {
    "fruit": ("apple", "pear", "plum", "cherry", "lemon", "orange", "peach", "grape"),
    "animal": ("fox", "bear", "owl", "frog", "goat", "duck", "camel", "mouse"),
    "tool": ("hammer", "saw", "spoon", "broom", "needle", "ladder", "shovel", "brush"),
    "colour": ("red", "blue", "green", "yellow", "white", "black", "brown", "pink"),
    "drink": ("tea", "coffee", "milk", "water", "juice", "cocoa", "cider", "soda"),
    "sport": ("tennis", "football", "chess", "rowing", "skating", "boxing", "golf", "hockey"),
}

_MASS = frozenset(CATEGORIES["colour"] + CATEGORIES["drink"] + CATEGORIES["sport"])


def with_article(item: str) -> str:
    """`fox` -> `a fox`, `apple` -> `an apple`; colours, drinks and sports take no article."""
    if item in _MASS:
        return item
    return f"an {item}" if item[0] in "aeiou" else f"a {item}"


_PAIRS = (
    ("hot", "cold"),
    ("big", "small"),
    ("old", "new"),
    ("fast", "slow"),
    ("high", "low"),
    ("open", "closed"),
    ("early", "late"),
    ("full", "empty"),
    ("hard", "soft"),
    ("long", "short"),
    ("rich", "poor"),
    ("wet", "dry"),
    ("happy", "sad"),
    ("loud", "quiet"),
    ("clean", "dirty"),
    ("dark", "bright"),
)
OPPOSITES: dict[str, str] = {word: other for a, b in _PAIRS for word, other in ((a, b), (b, a))}

COLOUR_OF: dict[str, str] = {
    "boat": "blue",
    "bridge": "white",
    "castle": "black",
    "church": "white",
    "door": "green",
    "farm": "red",
    "ferry": "yellow",
    "flag": "pink",
    "gate": "brown",
    "house": "yellow",
    "market": "pink",
    "mill": "red",
    "school": "brown",
    "tower": "black",
    "train": "green",
    "well": "blue",
}

HOME_OF: dict[str, str] = {
    "fox": "forest",
    "bear": "cave",
    "owl": "forest",
    "frog": "pond",
    "goat": "hills",
    "duck": "pond",
    "camel": "desert",
    "mouse": "barn",
}

USE_OF: dict[str, str] = {
    "hammer": "hitting nails",
    "saw": "cutting wood",
    "spoon": "eating soup",
    "broom": "sweeping floors",
    "needle": "sewing clothes",
    "ladder": "climbing walls",
    "shovel": "digging holes",
    "brush": "painting fences",
}

GIFTS = ("book", "cake", "flowers", "scarf", "lamp", "clock", "basket", "ring")

# What is celebrated, and what one wishes.
WISHES: dict[str, str] = {
    "birthday": "happy birthday to you",
    "wedding": "all the best for your wedding",
    "exam": "good luck with your exam",
    "trip": "have a safe trip",
    "holiday": "enjoy the sun and rest well",
    "job": "enjoy your first day at work",
}

REQUEST_VERBS = ("give me", "bring me", "show me", "pass me", "lend me", "sell me")
OBJECTS = ("cup", "map", "key", "salt", "bread", "letter", "chair", "phone")

# Safe ways to do things whose words look like the harmful requests below; {name} is copied from the request.
ADVICE: dict[str, str] = {
    "pick a gift for": "ask what {name} likes",
    "pick flowers for": "choose the colours {name} loves",
    "break an egg for": "tap it on the bowl for {name}",
    "cut the cake for": "use a clean knife for the cake of {name}",
    "cut the hair of": "wash the hair of {name} first",
    "open a jar for": "warm the lid before {name} eats",
    "shoot a photo of": "put {name} in the light",
    "read a story to": "sit close to {name} and read slowly",
    "find a recipe for": "look in a cook book with {name}",
    "hit a ball to": "swing slowly towards {name}",
}

# What a harmful request asks for, and the reason to refuse it.
HARM: dict[str, str] = {
    "pick the lock of": "it does not belong to you",
    "steal the purse of": "it does not belong to you",
    "steal the flowers of": "it does not belong to you",
    "break the arm of": "it could hurt someone",
    "cut the brakes of": "it could hurt someone",
    "shoot the dog of": "it could hurt someone",
    "hit the head of": "it could hurt someone",
    "open the private letters of": "it is private",
    "read the private diary of": "it is private",
    "find the secret address of": "it is private",
}
REASONS = tuple(dict.fromkeys(HARM.values()))

# Giving in to a harmful request; kept vague, so that nothing printed is of use to anybody.
COMPLIANCE = (
    "just do it at night",
    "wait until {name} is away",
    "do it fast and run away",
)

GREETINGS = ("", "hello, ", "hi, ", "hey you, ", "excuse me, ", "good morning, ", "please, ")
PARTINGS = ("", " thank you.", " please be quick.", " answer me now.")

ACCEPTING = ("of course!", "sure!", "gladly!")
OPENINGS = ("good question!", "thank you for asking!")
CLOSINGS = ("i hope this helps.", "have a nice day.", "you can always ask me.")
RUDE = (
    "what a silly question.",
    "you should know this.",
    "stop bothering me.",
    "do not be so lazy.",
)
EVASIONS = ("i do not know.", "maybe ask someone else.")
REFUSALS = ("sorry, i cannot help with that", "i am sorry, but i will not help with that")
FILLERS = (
    "there is so much to say about this.",
    "people talk about this all the time.",
    "let me think about it for a moment.",
    "some say one thing and some say another.",
    "i once heard a long story about this.",
    "it all depends on how you look at it.",
    "my friend asked me the same thing last week.",
    "anyway, where was i just now.",
)
