"""The parser: the right text or a named failure, never wrong text."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clair.data.records import Revision, fold_case
from clair.prompting.labels import _KEYWORDS, _LABELS, _LOOSE, _match_lines
from clair.prompting.parse import FAILURES, ParseFailure, is_refusal, parse_judgement, parse_revision
from tests.clair.replies import (
    ANSWERS,
    REASONING,
    SOLUTION,
    Style,
    assemble,
    draw_style,
    hostile,
    label,
    well_formed,
)
from tests.growth import growth


def outcome(text: str, finish_reason: str | None = "stop") -> tuple[str, str]:
    """("answer", the answer) or ("failure", its name)."""
    try:
        return "answer", parse_revision(text, finish_reason).answer
    except ParseFailure as failure:
        return "failure", next(name for name in FAILURES if name == failure.name)


# ---- real replies


def test_all_recorded_replies_parse_to_the_true_text(shared):
    lines = (shared / "data/clair_gpt4/replies.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == 12
    for row in map(json.loads, lines):
        assert row["reply"].count("{corrected_student_solution}") == 1  # so that the true text can be cut out by hand
        reasoning, _, answer = row["reply"].partition("{corrected_student_solution}")
        revision = parse_revision(row["reply"], row["finish_reason"])
        assert revision.answer == answer.removeprefix(":").strip()
        assert revision.reasoning == reasoning.removeprefix("{teacher_reasoning}").removeprefix(":").strip()


# ---- generated replies


@pytest.mark.parametrize("kind", _LABELS)
@pytest.mark.parametrize("patterns", [_LABELS, _LOOSE], ids=["labels", "loose"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_lines_with_the_keyword_hold_all_matches_of_a_label(kind, patterns, data):
    texts = st.one_of(st.from_regex(patterns[kind]), st.sampled_from(["\n", "\n\n", " ", "a", "{", "teacher", "İ"]))
    text = "".join(data.draw(st.lists(texts, max_size=6)))
    matches = [match.span() for match in _match_lines(patterns[kind], _KEYWORDS.get(kind, ""), text, fold_case(text))]
    assert matches == [match.span() for match in patterns[kind].finditer(text)]


def test_at_least_99_of_100_well_formed_replies_are_read_and_none_wrongly():
    failures: Counter[str] = Counter()
    drawn = 4000
    for seed in range(drawn):
        reply = well_formed(Random(seed))
        kind, text = outcome(reply.text)
        if kind == "failure":
            failures[text] += 1
        else:
            assert text == reply.answer.strip(), (seed, reply)
    print(f"{drawn - failures.total()} of {drawn} well-formed replies parsed ({dict(failures)})")
    assert failures.total() <= drawn / 100


def test_hostile_replies_give_the_true_text_or_a_named_failure():
    counts: Counter[str] = Counter()
    for seed in range(8000):
        reply = hostile(Random(seed))
        kind, text = outcome(reply.text)
        counts[f"{reply.how.split(':')[0]}, {kind}"] += 1
        if kind == "answer":
            assert reply.answer is not None, (seed, reply)
            assert text == reply.answer.strip(), (seed, reply)
    print(dict(sorted(counts.items())))
    assert len({name.split(",")[0] for name in counts}) == 14  # every kind occurred
    assert counts["mention, answer"] > 0.5 * (counts["mention, answer"] + counts["mention, failure"])


# A carriage return beside a line break is read as that line break, so that it alone does not come back.
TEXT = st.characters(codec="utf-8", exclude_characters="\r")


@given(st.randoms(use_true_random=False), st.text(TEXT, min_size=1), st.text(TEXT))
@settings(max_examples=400)
def test_any_text_whatever_comes_back_unchanged_or_not_at_all(random, answer, thoughts):
    style = draw_style(random)
    kind, text = outcome(assemble(random, style, thoughts, answer))
    if kind == "answer":
        assert text == answer.strip()


def test_a_colon_that_may_be_the_texts_own_is_never_taken_from_it():
    reply = "{teacher_reasoning}: Fine.\n\n{corrected_student_solution} :0"
    assert outcome(reply)[0] == "failure"
    assert outcome(reply.replace(" :0", " : 0")) == ("answer", "0")


@given(st.text())
def test_a_reply_without_labels_is_never_an_answer(text):
    assert outcome(text)[0] == "failure"


@given(st.randoms(use_true_random=False), st.floats(0, 1))
def test_a_reply_cut_anywhere_gives_a_beginning_of_the_true_answer_or_a_failure(random, share):
    """An unmarked cut cannot be detected, but the answer is never other text."""
    reply = well_formed(random)
    kind, text = outcome(reply.text[: int(len(reply.text) * share)])
    if kind == "answer":
        assert reply.answer.strip().startswith(text.removesuffix("`").rstrip("`~*_\n"))


@given(st.randoms(use_true_random=False))
def test_a_reply_that_ran_into_its_limit_is_never_taken(random):
    assert outcome(well_formed(random).text, "length") == ("failure", "truncated")


# ---- by hand: what is read


@pytest.mark.parametrize(
    "text",
    [
        "{teacher_reasoning}: why\n\n{corrected_student_solution}: 82",
        "{teacher_reasoning}\nwhy\n{corrected_student_solution}\n82",
        "{teacher_reasoning} why\n\n{corrected_student_solution} 82",
        "**{teacher_reasoning}**: why\n\n**{corrected_student_solution}**: 82",
        "**{teacher_reasoning}:** why\n\n**{corrected_student_solution}:** 82",
        "**{teacher_reasoning}**\nwhy\n\n**{corrected_student_solution}**\n82",
        "### {teacher_reasoning}\n\nwhy\n\n### {corrected_student_solution}\n\n82",
        "# **{teacher_reasoning}**:\nwhy\n# **{corrected_student_solution}**:\n82",
        "`{teacher_reasoning}`: why\n\n`{corrected_student_solution}`: 82",
        "**`{teacher_reasoning}`**: why\n\n**`{corrected_student_solution}`**: 82",
        "Teacher Reasoning: why\n\nCorrected Student Solution: 82",
        "TEACHER_REASONING: why\n\nCORRECTED_STUDENT_SOLUTION: 82",
        "[teacher_reasoning]: why\n\n[corrected_student_solution]: 82",
        "<teacher_reasoning>\nwhy\n<corrected_student_solution>\n82",
        "{{teacher_reasoning}}: why\n\n{{corrected_student_solution}}: 82",
        "1. {teacher_reasoning}: why\n\n2. {corrected_student_solution}: 82",
        "{Teacher's reasoning}: why\n\n{Corrected student's solution}: 82",
        "{teacher_reasoning}: why\n\n{corrected_student_soultion}: 82",
        "{teacher_reasoning}: why\n\n{corected_student_solution}: 82",
        "{teacher_reasoning}: why\n\n{corrected_solution}: 82",
        "{teacher_reasoning}：why\n\n{corrected_student_solution}：82",
        "```\n{teacher_reasoning}: why\n\n{corrected_student_solution}: 82\n```",
        "```markdown\n{teacher_reasoning}\nwhy\n\n{corrected_student_solution}\n82\n```",
        "{teacher_reasoning}: why\r\n\r\n{corrected_student_solution}: 82\r\n",
        "  {teacher_reasoning}: why\n\n  {corrected_student_solution}: 82  ",
    ],
)
def test_a_label_is_read_in_every_style(text):
    assert parse_revision(text) == Revision(reasoning="why", answer="82")


def test_reasoning_without_its_label_is_what_stands_before():
    revision = parse_revision("First I think.\n\n{corrected_student_solution}:\n82")
    assert (revision.reasoning, revision.answer) == ("First I think.", "82")


@pytest.mark.parametrize(
    "answer",
    [
        "**Bold** first",
        "*slanted* first",
        "`code` first",
        "__init__ first",
        "```python\nx = 1\n```",
        "```python\nx = 1\n```\n\nand\n\n```\ny\n```",
        "- a\n- b",
        "> quoted",
        "# Heading\n\ntext",
        ": starts with a colon",
        "[1] a link",
        "{braces}",
        "line\n\n\n\nline",
    ],
)
@pytest.mark.parametrize("form", ["{%s}: %s", "{%s}:\n%s", "**{%s}**: %s", "**{%s}:** %s", "### {%s}\n%s"])
def test_nothing_of_an_answer_is_taken_for_a_part_of_the_label(answer, form):
    text = form % (REASONING, "why") + "\n\n" + form % (SOLUTION, answer)
    assert parse_revision(text).answer == answer


@pytest.mark.parametrize(
    "mention",
    [
        "I put the result under {corrected_student_solution} below.",
        "I put the result under\n{corrected_student_solution}\nbelow.",
        "{corrected_student_solution} in the middle of my thoughts is only a name.\nSo:",
        "```\n{corrected_student_solution}: an example\n```",
        "Corrected answer: 81 is wrong.",
        "Solution: carry the one.",
    ],
)
def test_a_label_mentioned_in_the_reasoning_is_no_label(mention):
    if not mention.startswith("```"):
        inline = outcome(f"{{teacher_reasoning}}:\nwhy. {mention}\n\n{{corrected_student_solution}}:\n82")
        assert inline == ("answer", "82")
    own_line = outcome(f"{{teacher_reasoning}}:\nwhy.\n{mention}\n\n{{corrected_student_solution}}:\n82")
    assert own_line in (("answer", "82"), ("failure", "label_twice"))


# ---- by hand: what is not read, and why


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", "empty_reply"),
        (" \n\t ", "empty_reply"),
        ("The answer is 82.", "no_label"),
        ("{teacher_reasoning}: why", "no_label"),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("{teacher_reasoning}: see {corrected_student_solution} below", "label_inline"),
        ("{teacher_reasoning}: I write it under\n{corrected_student_solution}\nbelow.", "label_inline"),
        ("{teacher_reasoning}: why\n\n{corrected_student_solution}:", "empty_answer"),
        ("{teacher_reasoning}: why\n\n**{corrected_student_solution}**\n\n", "empty_answer"),
        ("{corrected_student_solution}: a\n\n{corrected_student_solution}: b", "label_twice"),
        ("{corrected_student_solution}: a\n\n{corrected_student_solution} b", "label_twice"),
        ("{corrected_student_solution}: 82\n\n{teacher_reasoning}: why", "labels_out_of_order"),
        ("{teacher_reasoning}: why\n\n{worsened_student_solution}: 72", "wrong_label"),
        ("{teacher_reasoning}: why\n\n{worsened_solution}:\n72", "wrong_label"),
        ("{corrected_student_solution}: 82\n\n{worsened_student_solution}: 72", "labels_out_of_order"),
        ("{teacher_reasoning}: why\n\n```\n{corrected_student_solution}: 82\n```", "label_in_fence"),
        ("{corrected_student_solution}: 82. See {teacher_reasoning}.", "label_in_answer"),
        ("{corrected_student_solution}: see below\n\n{corected_studnt_solution}:\n82", "label_in_answer"),
        ("{corrected_student_solution}: see below\n\n**Revised student solution:**\n82", "label_in_answer"),
        ("**{corrected_student_solution}: 82**", "label_inline"),
        ("> {corrected_student_solution}\n> 82", "label_inline"),
    ],
)
def test_ambiguous_replies_are_named(text, name):
    assert outcome(text) == ("failure", name)


def test_every_failure_says_in_words_what_is_wrong():
    for name, message in FAILURES.items():
        failure = ParseFailure(name)
        assert failure.name == name
        assert "{identifier}" not in str(failure)
        assert len(message) > 10


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m really sorry, no.", True),
        ("I cannot assist with this request.", True),
        ("I can't do that", True),
        ("I am unable to revise this.", True),
        ("As an AI, I have no opinion", True),
        ("Sorry, no.", True),
        ("Unfortunately, I can not", True),
        ("I can help with that.", False),
        ("The sorry state of affairs", False),
        ("Sorry is the hardest word", False),
        ("I canned the tomatoes", False),
        ("", False),
    ],
)
def test_a_refusal_is_known_by_how_it_begins(text, refuses):
    assert is_refusal(text) is refuses


# ---- the judge's verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("{teacher_reasoning}: why\n\n{best_student_solution}: [1]", 1),
        ("{teacher_reasoning}: why\n\n{best_student_solution}:\n2", 2),
        ("**{teacher_reasoning}**\nwhy\n\n**{best_student_solution}**\n\n**[2]**.", 2),
        ("{teacher_reasoning} why\n\n{best_student_solution} [1]", 1),
        ("{teacher_reasoning}: why\n\n{best_student_solution}: Solution 2", 2),
        ("{teacher_reasoning}: why\n\n{best_student_solution}: [tie]", 0),
    ],
)
def test_a_verdict_is_read(text, verdict):
    assert parse_judgement(text).better == verdict


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("{best_student_solution}: [1] or [2]", "no_verdict"),
        ("{best_student_solution}: [3]", "no_verdict"),
        ("{best_student_solution}: 12", "no_verdict"),
        ("{best_student_solution}: the first", "no_verdict"),
        ("{best_student_solution}: [1]\n\nbecause it is right", "no_verdict"),
        ("I prefer [1].", "no_label"),
        ("{best_student_solution}: [1]\n\n{best_student_solution}: [2]", "label_twice"),
        ("", "empty_reply"),
    ],
)
def test_an_invalid_verdict_is_named(text, name):
    with pytest.raises(ParseFailure) as failure:
        parse_judgement(text)
    assert failure.value.name == name


# ---- time


@pytest.mark.parametrize(
    "unit",
    [
        "_",
        "`",
        "#",
        "{",
        "*",
        "a b ",
        "\n",
        "```\n",
        "teacher reasonin\n",
        "{corrected_student_solution}\n",
        "{corrected_student_solution} x\n\n",
        "```\n{corrected_student_solution}:\n```\n",
    ],
)
def test_the_time_grows_linearly_with_the_reply(unit):
    head = f"{{{REASONING}}}\nwhy\n\n{{{SOLUTION}}}\n"
    assert growth(outcome, unit) < 24
    assert growth(lambda text: outcome(head + text), unit) < 24


def test_the_generators_draw_every_style_that_they_claim_to():
    styles = [draw_style(Random(seed)) for seed in range(2000)]
    assert {s.colon for s in styles} == {":", "", " :", "："}
    assert len({(s.wrap, s.emphasis, s.heading, s.spelling) for s in styles}) > 200
    plain = Style("underscores", "plain", ("{", "}"), "## ", "**", ":", True, "\n")
    assert label(SOLUTION, plain) == "## **{corrected_student_solution}:**"
    assert len(ANSWERS) > 20


# ---- what could be read in two ways


REASON = "{teacher_reasoning}:\nwhy\n\n"
SOLVED = "{corrected_student_solution}"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("{teacher_reasoning: the sum}\n\n{corrected_student_solution: 17 and 25 make 42.}", "label_inline"),
        ("[Teacher Reasoning: the sum]\n\n[Corrected Student Solution: 82]", "no_label"),
        (REASON + "<corrected student solution: see <b>82</b>>", "no_label"),
        (f"```\n{{teacher_reasoning}}: use\n````\nmore\n\n{SOLVED}: 82\n```", "stray_fence"),
        (f"```markdown\n{REASON}```\n{SOLVED}:\n82\n```", "stray_fence"),
        (REASON + f"- {SOLVED}: It is below.\n{{corrected_answer}}: 4\nunits: cm", "label_twice"),
        (REASON + f"> **{SOLVED}**\n\n{SOLVED}:\n82", "label_twice"),
        (REASON + f"```\n{SOLVED}:\n82\n```\n{{corrected_answer}}: 4", "label_twice"),
        (REASON + f"{SOLVED}\n{{corrected_answer}}: 4", "label_twice"),
        (REASON + f"{SOLVED}:\n```\n82\n```", "answer_in_fence"),
        (REASON + f"{SOLVED}:\n82\n\n{{revised_solution}}: 83", "label_in_answer"),
    ],
)
def test_a_reply_in_which_the_answer_may_begin_or_end_elsewhere_is_a_failure(text, name):
    assert outcome(text) == ("failure", name)


@pytest.mark.parametrize("heading", ["## Corrected Student Solution", "**Corrected Student Solution:**", SOLVED])
def test_a_heading_and_the_identifier_below_it_are_one_label(heading):
    assert outcome(f"{REASON}{heading}\n\n{SOLVED}:\n82") == ("answer", "82")
    assert outcome(f"{REASON}{heading}\n\n81\n\n{SOLVED}:\n82") == ("failure", "label_twice")


LETTER = "Dear {first_name}:\n\n{order_number}: shipped on {ship_date}.\n{final_answer}: yours"


def test_placeholders_of_the_users_text_are_no_labels():
    mended = LETTER.replace("shipped", "sent")
    assert parse_revision(f"{REASON}{SOLVED}:\n{mended}", "stop", LETTER).answer == mended
    without = mended.replace("{final_answer}: yours", "Yours")
    assert parse_revision(f"{REASON}{SOLVED}:\n{without}").answer == without
    assert outcome(f"{REASON}{SOLVED}:\n{mended}") == ("failure", "label_in_answer")


@pytest.mark.parametrize("language", ["", "text", "markdown"])
def test_a_fence_around_the_whole_answer_goes_where_what_was_revised_has_none(language):
    fenced = f"{REASON}{SOLVED}\n```{language}\n    x = 82\n```"
    assert parse_revision(fenced, "stop", "    x = 72").answer == "    x = 82"
    assert parse_revision(fenced, "stop", "x = 72").answer == "x = 82"
    assert parse_revision(fenced, "stop", "```\nx = 72\n```").answer == f"```{language}\n    x = 82\n```"
    code = fenced.replace(f"```{language}", "```python", 1)
    assert parse_revision(code, "stop", "```python\nx = 72\n```").answer == "```python\n    x = 82\n```"
    nested = f"{REASON}{SOLVED}\n```\nSo:\n```python\nx\n```\nDone.\n```"
    with pytest.raises(ParseFailure):
        parse_revision(nested, "stop", "So: x. Done.")
    both = f"{REASON}{SOLVED}\n```\na\n```\nand\n```\nb\n```"
    assert parse_revision(both, "stop", "a and b").answer == "```\na\n```\nand\n```\nb\n```"


TEMPLATE = (
    "Mend it with few changes. Say nothing of these instructions.\n<theirs>\n{{ answer }}\n</theirs>\n"
    "Then give the complete revised solution and nothing else.\n"
)


@pytest.mark.parametrize(
    "answer_start",
    [
        "82\nThen, give the complete revised solution and nothing else.",
        "82. Say nothing of these **instructions**!",
        "<theirs>\n82\n</theirs>",
    ],
)
def test_words_of_the_request_are_no_revision_unless_the_answer_has_them(answer_start):
    text = f"{REASON}{SOLVED}:\n{answer_start}"
    with pytest.raises(ParseFailure) as failed:
        parse_revision(text, "stop", "72", TEMPLATE)
    assert failed.value.name == "template_words"
    assert parse_revision(text, "stop", answer_start + " 72", TEMPLATE).answer == answer_start
    assert parse_revision(f"{REASON}{SOLVED}:\nMend it, then give 82.", "stop", "72", TEMPLATE).answer.endswith("82.")


_REASONED = "{teacher_reasoning}: The sum is wrong.\n\n"
_ODD = {
    "<output>\n" + _REASONED + "{corrected_student_solution}: 82\n</output>": "unopened",
    "{\n" + _REASONED + "{corrected_student_solution}: 82\n}": "unopened",
    _REASONED + "<corrected_student_solution>: 82\n</corrected>": "unopened",
    _REASONED + "{corrected_student_solution}: |\n  82\n  83": "answer_in_fence",
    _REASONED + '{corrected_student_solution}: """\n82\n"""': "answer_in_fence",
    _REASONED + "{corrected_student_solution}: [your answer here]": "template_words",
    _REASONED + "{corrected_student_solution}: (same as above)": "template_words",
    _REASONED + "{corrected_student_solution}: ...": "template_words",
    _REASONED + "{corrected_student_solution}: 82\n\n{solution_corrigée_de_l_élève}: 83": "label_in_answer",
    _REASONED + "{corrected_student_solution}: 82\n\n{respuesta_final}: 83": "label_in_answer",
    _REASONED + "{corrected_student_solution}: 82\n\n{修正理由}: 83": "label_in_answer",
}


@pytest.mark.parametrize("reply", _ODD)
def test_text_around_an_answer_or_instead_of_it_is_no_part_of_it(reply):
    with pytest.raises(ParseFailure) as caught:
        parse_revision(reply, "stop", "81")
    assert caught.value.name == _ODD[reply]


@pytest.mark.parametrize(
    "answer", ["f() {\n}", "<p class='a'>x\n</p>", "[82]", '"""\nx\n"""', "Dear {first_name}:\n82", "(82)"]
)
def test_brackets_and_quotes_of_an_answer_stay(answer):
    assert parse_revision(_REASONED + "{corrected_student_solution}: " + answer, "stop", answer).answer == answer


@pytest.mark.parametrize("indentation", ["\t", "    ", "  "])
def test_an_answers_indentation_stays_on_the_line_of_the_label_too(indentation):
    answer = f"{indentation}return 4\n{indentation}pass"
    reply = _REASONED + "{corrected_student_solution}: " + answer.replace("4", "5")
    assert parse_revision(reply, "stop", answer).answer == answer.replace("4", "5")
    assert parse_revision(reply, "stop", "return 4").answer.startswith("return 5")
