"""Replies of a reviser as they come: the two labels in every recorded style, and every kind of error.

`well_formed` draws what a person would read in exactly one way; `hostile` draws what must give the true text or a named
failure. Both take a `random.Random`, so that a test can draw thousands and hypothesis can shrink one.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

REASONING = "teacher_reasoning"
SOLUTION = "corrected_student_solution"

SENTENCES = (
    "The student's solution adds the tens but forgets the carry.",
    "Only the last sentence must change; everything else can stay.",
    "First, 37 + 45 = 82, not 72.",
    "This makes the answer clearer and more engaging.",
    "The original solution is mostly correct.",
    "It should say what the function returns: a list, not a tuple.",
    "- the tone is right\n- the number is wrong",
    "1. **Clarity**: shorter sentences.\n2. **Facts**: Paris, not Lyon.",
    "Das ist fast richtig, aber 3 × 4 = 12.",
    "答案是正确的，只需要改一个词。",
    "Let me reason step by step about the student's solution:",
    "```python\nprint(37 + 45)  # 82\n```",
    "Correct answer: 82.",
    "Solution: carry the one.",
    "| a | b |\n|---|---|\n| 1 | 2 |",
)
"""Paragraphs that may stand in reasoning and in an answer alike, none of which alludes to a label."""

ANSWERS = (
    "82",
    "The answer is 82.",
    "Ada has 82 apples now.\n\nShe counted them twice.",
    "```python\ndef f(x):\n    return [x]\n```",
    "Here is the function:\n\n```python\ndef f(x):\n    return {x: x}\n```\n\nIt returns a dict.",
    "1. Boil water.\n2. Add tea.\n3. Wait.",
    "# Title\n\nSome **bold** words: yes.",
    "def f(x):\n    return x",
    "{}",
    "{'key': [1, 2]}",
    "[1] is better than [2].",
    "Answer: 82",
    "The corrected total is 82: see above.",
    "مرحبا بالعالم 😀",
    "> quoted\n> twice",
    "- one\n- two\n\n---\n\nthree",
    "<b>bold</b>",
    'The student said: "I am a student".',
    "$x^2$ and `code` and ~~gone~~",
    "**Answer:** 82",
    "**82** apples",
    "*82* apples, _exactly_",
    "`f(x)` returns 82",
    "__init__ is a method",
    "```inline``` code",
    "~~~\nplain\n~~~",
    "# {title}\n\n{body}",
)

MIDLINE_MENTIONS = (
    "I will write the result under {corrected_student_solution} below.",
    "The text under `{corrected_student_solution}` keeps every other word.",
    "As {teacher_reasoning} asks, I think first; then comes {corrected_student_solution}.",
    "The corrected_student_solution differs in one word.",
    "My corrected student solution: it changes one word.",
)
LINE_START_MENTIONS = (
    "{corrected_student_solution} will hold the result.",
    "Under\n{corrected_student_solution} I copy every word but one.",
    "I give the result under\n{corrected_student_solution}\nbelow.",
    "**{corrected_student_solution}** is the place for it.",
    "> {corrected_student_solution}\n\nis the identifier I must use.",
    "```\n{corrected_student_solution}\nexample\n```",
    "```\n{teacher_reasoning}: why\n{corrected_student_solution}: what\n```",
)
COLON_MENTIONS = (
    "{corrected_student_solution}: that is where the result goes.",
    "Corrected student solution: see below.",
)
"""Alone in a reply these are its solution, whatever was meant; they are a mention only beside another one."""


@dataclass(frozen=True)
class Drawn:
    """A generated reply: what it says, the true answer, and how it was made (for a failing test's message)."""

    text: str
    answer: str | None
    how: str


@dataclass(frozen=True)
class Style:
    """The style of one reply's two labels."""

    spelling: str
    case: str
    wrap: tuple[str, str]
    heading: str
    emphasis: str
    colon: str
    colon_inside: bool
    gap: str

    @property
    def by_position(self) -> bool:
        """No colon, and text follows on the same line: read only where both labels open a paragraph."""
        return self.colon == "" and self.gap == " "


def draw_style(random: Random) -> Style:
    spelling = random.choice(("underscores",) * 4 + ("spaces", "hyphens"))
    plain = spelling == "underscores" and random.random() < 0.8
    wrap = random.choice((("{", "}"),) * 5 + (("[", "]"), ("<", ">"), ("{{", "}}"), ("", "")))
    heading = random.choice(("",) * 4 + ("# ", "## ", "### ", "#### "))
    emphasis = random.choice(("",) * 3 + ("**", "__", "*", "`", "***"))
    colon = random.choice((":", ":", "", " :", "："))
    gap = random.choice((" ", "\n", "\n\n", "\n \n"))
    if gap == " " and colon == "" and (wrap != ("{", "}") or heading or emphasis or not plain):
        gap = "\n"  # text straight after a decorated label without a colon: label and text cannot be distinguished
    case = "plain" if plain else random.choice(("plain", "upper", "title"))
    return Style(spelling, case, wrap, heading, emphasis, colon, random.random() < 0.5, gap)


def label(identifier: str, style: Style) -> str:
    """An identifier as this style writes it."""
    text = identifier.replace("_", {"underscores": "_", "spaces": " ", "hyphens": "-"}[style.spelling])
    text = {"plain": text, "upper": text.upper(), "title": text.title()}[style.case]
    inner = f"{style.wrap[0]}{text}{style.wrap[1]}"
    if style.emphasis and style.colon_inside:
        return f"{style.heading}{style.emphasis}{inner}{style.colon}{style.emphasis}"
    return f"{style.heading}{style.emphasis}{inner}{style.emphasis}{style.colon}"


def paragraphs(random: Random, choices: tuple[str, ...], max_count: int) -> str:
    return "\n\n".join(random.choice(choices) for _ in range(random.randint(1, max_count)))


def assemble(random: Random, style: Style, thoughts: str, answer: str) -> str:
    opening = random.choice(("",) * 6 + ("Sure, let me help.\n\n", "---\n\n"))
    if style.by_position:
        opening = random.choice(("", "Sure, let me help.\n\n"))
    between = "\n\n" if style.by_position else random.choice(("\n\n", "\n\n", "\n\n\n", "\n"))
    text = f"{opening}{label(REASONING, style)}{style.gap}{thoughts}{between}"
    text += f"{label(SOLUTION, style)}{style.gap}{answer}"
    text += random.choice(("", "", "\n", "\n\n  "))
    if random.random() < 0.1 and "```" not in text:
        text = random.choice(("```\n%s\n```", "```markdown\n%s\n```", "~~~\n%s\n~~~")) % text.strip("\n")
    return text.replace("\n", "\r\n") if random.random() < 0.1 else text


def well_formed(random: Random) -> Drawn:
    """A reply with one reading only: mentions of a label are in the middle of lines."""
    style = draw_style(random)
    thoughts = paragraphs(random, SENTENCES, 3)
    if random.random() < 0.1:
        thoughts += "\n\n" + random.choice(MIDLINE_MENTIONS)
    answer = paragraphs(random, ANSWERS + SENTENCES, 3)
    return Drawn(assemble(random, style, thoughts, answer), answer, f"{style}")


def misspelt(random: Random, identifier: str) -> str:
    """An identifier with one to three letters lost, doubled, exchanged or replaced."""
    letters = list(identifier)
    for _ in range(random.randint(1, 3)):
        index = random.randrange(len(letters) - 1)
        kind = random.choice(("lose", "double", "swap", "replace"))
        if kind == "lose":
            del letters[index]
        elif kind == "double":
            letters.insert(index, letters[index])
        elif kind == "swap":
            letters[index], letters[index + 1] = letters[index + 1], letters[index]
        else:
            letters[index] = random.choice("abcdefgh_")
    return "".join(letters)


def hostile(random: Random) -> Drawn:
    """A reply with something wrong in it. `answer` is the text it truly gives, None where it gives none."""
    style = draw_style(random)
    thoughts, answer = paragraphs(random, SENTENCES, 2), paragraphs(random, ANSWERS + SENTENCES, 2)
    mention = random.choice(MIDLINE_MENTIONS + LINE_START_MENTIONS)
    beside = random.choice(MIDLINE_MENTIONS + LINE_START_MENTIONS + COLON_MENTIONS)
    solution = label(SOLUTION, style)
    reasoning = label(REASONING, style)
    kind = random.choice(
        (
            "mention",
            "mention",
            "no solution",
            "misspelt",
            "misspelt and mentioned",
            "twice",
            "worsened",
            "worsened after",
            "mention in answer",
            "swapped",
            "cut in label",
            "only answer",
            "solution in fence",
            "two drafts",
            "other words",
        )
    )
    both = f"{reasoning}{style.gap}{thoughts}\n\n"
    text, truth = "", None
    if kind == "mention":
        both_thoughts = random.choice((f"{beside}\n\n{thoughts}", f"{thoughts}\n\n{beside}", f"{thoughts}\n{beside}"))
        text, truth = assemble(random, style, both_thoughts, answer), answer
    elif kind == "no solution":
        text = f"{both}{mention}"
    elif kind == "misspelt":
        text, truth = f"{both}{label(misspelt(random, SOLUTION), style)}{style.gap}{answer}", answer
    elif kind == "misspelt and mentioned":
        text = f"{both}{beside}\n\n{label(misspelt(random, SOLUTION), style)}{style.gap}{answer}"
        truth = answer
    elif kind == "twice":
        text = f"{both}{solution}{style.gap}{answer}\n\n{solution}{style.gap}{answer}"
    elif kind == "worsened":
        text = f"{both}{label('worsened_student_solution', style)}{style.gap}{answer}"
    elif kind == "worsened after":
        text, truth = f"{both}{solution}{style.gap}{answer}\n\n{{worsened_student_solution}}:\nbad", answer
    elif kind == "mention in answer":
        text, truth = f"{both}{solution}{style.gap}{answer}\n\n{beside}", f"{answer}\n\n{beside}"
    elif kind == "swapped":
        text, truth = f"{solution}{style.gap}{answer}\n\n{reasoning}{style.gap}{thoughts}", answer
    elif kind == "cut in label":
        text = f"{both}{solution[: random.randint(1, len(solution) - 1)]}"
    elif kind == "only answer":
        text = answer
    elif kind == "solution in fence":
        text, truth = f"{both}```\n{label(SOLUTION, style)}{style.gap}{answer}\n```", answer
    elif kind == "two drafts":
        text = f"{both}{solution}{style.gap}draft\n\nOn second thought:\n\n{solution}{style.gap}{answer}"
        truth = answer
    else:
        wrong_label = random.choice(
            ("corrected_solution", "Improved solution", "revised_student_solution", "Final answer")
        )
        text, truth = f"{both}{mention}\n\n{label(wrong_label, style)}{style.gap}{answer}", answer
    return Drawn(text, truth, f"{kind}: {style}")
