"""What the demonstration asks: experts of conventions, those of languages, and those of ``smollm2``, which are more."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bayes_dispatch.errors import ConfigError
from bayes_dispatch.experts.domains import CONVENTIONS, Convention, Interleaved

__all__ = ["CONVENTION_PROMPTS", "LANGUAGE_PROMPTS", "REAL_PROMPTS", "DemoPrompt", "prompts_for"]

SOLVED_BYTES = 110  # of the solved items before a question, about


@dataclass(frozen=True)
class DemoPrompt:
    """One prompt.

    Attributes:
        name: short and unique. kind: what the tables call it, such as ``"pure"``, or ``"foreign"`` (without an expert).
        text: what the model reads. answer: how its continuation must begin; ``None`` where nothing is right or wrong.
    """

    name: str
    kind: str
    text: str
    answer: str | None = None


def _items(name: str, kind: str, *names: str) -> DemoPrompt:
    """Solved held-out items of the conventions in turn, and an open question of the next; seeded by ``name`` alone."""
    conventions = tuple(_convention(each) for each in names)
    rng = np.random.default_rng(list(name.encode()))
    solved = Interleaved(name, conventions).document(rng, SOLVED_BYTES, SOLVED_BYTES, "held_out").prompt
    following = conventions[solved.count("\n") % len(conventions)]
    rivals = [convention for convention in CONVENTIONS if convention.surface is following.surface]
    while True:
        question = following.surface.question(rng, "held_out")
        if len({rival.answer(question) for rival in rivals}) == len(rivals):  # its answer tells the conventions apart
            return DemoPrompt(name, kind, solved + question, following.answer(question) + "\n")


def _convention(name: str) -> Convention:
    return next(convention for convention in CONVENTIONS if convention.name == name)


JSON = """\
{"name": "Basket", "line": 12, "public": true, "doc": "A basket of fruit."}
{"name": "weigh", "line": 31, "arguments": ["self", "unit"], "doc": null}
{"name": "empty", "line": 47, "argum"""

CAPITALS = """\
THE FILE IS OPENED WHEN THE FIRST LINE IS READ, AND IT IS CLOSED AT THE END OF THE BLOCK. IF THE FILE DOES NOT EXIST,
AN ERROR IS RAISED. RETURN THE NUMBER OF CHARACTERS IN THE STR"""

CODE = '''\
def mean(values):
    """Return the arithmetic mean of a sequence of numbers."""
    if not values:
        raise Val'''

ROT13 = """\
Gur svefg cnff ernqf gur cebzcg, naq gur frpbaq cnff jevgrf gur nafjre. Orgjrra gurz gur qvfcngpure qrpvqrf ubj zhpu
bs rirel rkcreg vf jnag"""

FRENCH = """\
Le soir, les bateaux rentrent au port l'un après l'autre. Les pêcheurs déchargent leurs filets en silence, puis ils
s'en vont dans les ruelles où les fenêtres s'éc"""

HEXDUMP = """\
00000000  7f 45 4c 46 02 01 01 00  00 00 00 00 00 00 00 00
00000010  03 00 3e 00 01 00 00 00  60 6d 00 00 00 00 00 00
00000020  40 00 00 00"""

CONVENTION_PROMPTS: tuple[DemoPrompt, ...] = (
    *(_items(convention.name, "pure", convention.name) for convention in CONVENTIONS),
    DemoPrompt("json", "pure", JSON, 'ents": ['),
    DemoPrompt("capitals", "pure", CAPITALS, "ING"),
    DemoPrompt("code (base)", "pure", CODE, "ueError"),
    _items("no_carry & sort", "mixed", "no_carry", "sort"),
    _items("add & reverse", "mixed", "add", "reverse"),
    DemoPrompt("short: reverse", "short", "kfpa>apfk\nbcde>", "edcb\n"),
    DemoPrompt("short: add", "short", "37+58=95\n12+19=", "31\n"),
    DemoPrompt("rot13", "foreign", ROT13),
    DemoPrompt("French", "foreign", FRENCH),
    DemoPrompt("hexdump", "foreign", HEXDUMP),
)


def _entries(*pairs: tuple[str, str]) -> str:
    return "".join(f"EN: {english}\nTR: {translation}\n" for english, translation in pairs)


GERMAN = (
    ("Save", "Speichern"),
    ("Delete", "Löschen"),
    ("Username", "Benutzername"),
    ("Search results", "Suchergebnisse"),
)
FRENCH_PAIRS = (("Cancel", "Annuler"), ("New password", "Nouveau mot de passe"), ("Upload", "Téléverser"))
NORWEGIAN = (("Yes", "Ja"), ("Forgotten your password?", "Glemt passordet?"), ("Welcome", "Velkommen"))
BRAZILIAN = (("File", "Arquivo"), ("Username", "Usuário"), ("Sign up", "Cadastre-se"))
RUSSIAN = (("Save", "Сохранить"), ("Delete", "Удалить"), ("Home", "Главная"))
FINNISH = (("Save", "Tallenna"), ("Delete", "Poista"), ("Search", "Haku"))
READING = "To read a file, write\n\n    with open(path) as file:\n        text = file."
ASKED = "EN: Date\nTR:"

LANGUAGE_PROMPTS: tuple[DemoPrompt, ...] = (
    DemoPrompt("German", "pure", _entries(*GERMAN) + ASKED, " Datum\n"),
    DemoPrompt("Russian", "pure", _entries(*RUSSIAN) + ASKED, " Дата\n"),
    DemoPrompt("Brazilian", "near pair", _entries(*BRAZILIAN) + ASKED, " Data\n"),
    DemoPrompt(
        "German & French",
        "in turn",
        _entries(*(pair for both in zip(GERMAN, FRENCH_PAIRS, strict=False) for pair in both)) + ASKED,
        " Datum\n",
    ),
    DemoPrompt("German, then Norwegian", "switch", _entries(*GERMAN, *NORWEGIAN) + ASKED, " Dato\n"),
    DemoPrompt("one entry", "short", "EN: Yes\nTR: Ja\n" + ASKED),
    DemoPrompt("code in prose", "base", READING, "read()"),
    DemoPrompt("Finnish", "foreign", _entries(*FINNISH) + ASKED),
)

SPELL = "Q: Spell this word backward (example: sun -> nus): {}\nA:"
REVERSE = (
    "Q: Solve the following problem. Provide you answer as a comma-separated list of words with a space after the "
    "comma. Reverse this list of words: {}\nA:"
)
SPELT = "".join(f"{SPELL.format(word)} {word[::-1]}\n" for word in ("lamp", "wind", "tree"))
REVERSED = "".join(
    f"{REVERSE.format(words)} {answer}\n"
    for words, answer in (
        ("red, blue, green", "green, blue, red"),
        ("one, two", "two, one"),
        ("cat, dog, bird", "bird, dog, cat"),
    )
)
HEADER = """\
template <typename T>
inline void fill_row(const Tensor& self, int64_t row, const T value) {
  TORCH_CHECK(self.dim() == 2, "expected a matrix");
  for (int64_t i = 0; i < self.size(1); i"""

REAL_PROMPTS: tuple[DemoPrompt, ...] = (
    DemoPrompt("a word backward", "pure", SPELT + SPELL.format("cat"), " tac\n"),
    DemoPrompt("C++ header", "pure", HEADER, "++"),
    DemoPrompt(
        "German, then lists",
        "switch",
        _entries(*GERMAN) + REVERSED + REVERSE.format("sun, moon, star"),
        " star, moon, sun\n",
    ),
    *LANGUAGE_PROMPTS,
)


def prompts_for(experts: Sequence[str]) -> tuple[DemoPrompt, ...]:
    """The prompts that these experts are asked.

    Raises:
        ConfigError: there are none for them.
    """
    names = set(experts)
    if {"spell_backward", "word_sequence_reversal", "headers", "de", "fr", "nb"} <= names:
        return REAL_PROMPTS
    if {"de", "fr", "nb"} <= names:
        return LANGUAGE_PROMPTS
    if names.isdisjoint(known := [convention.name for convention in CONVENTIONS]):
        asked = f"{', '.join(known)}, or of languages"
        raise ConfigError(
            f"expected experts of {asked}, which the demonstration has prompts for, got {', '.join(experts)}"
        )
    return CONVENTION_PROMPTS
