"""Random chat templates of `scripts/fuzzers`: no Python object in their text, memory and steps in bounds."""

from __future__ import annotations

import pytest
from fuzzers.templates import VARIABLES, broken_rule, make_template

from mlxqwen.errors import TemplateError
from mlxqwen.text.sandbox import meter, render

OPERATIONS = """
t + t; t ~ t; t * 2; t == l[0]; t in l; 'x' in t; t[1:]; [t]; (t, i); {'a': t}; l[::-1]; i ** 2; '%s' % t; t | upper
l | map('upper') | list; l | select('in', t) | list; l | tojson; l | sort; l | join; t | replace('a', 'b')
t | wordcount; t.upper(); t.split(); t.find('x'); t.rfind('x'); t.isspace(); ' '.join(l); dict(a=t); t is eq(l)
namespace(); cycler(t)
"""


@pytest.fixture(autouse=True)
def low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "MAX_STEPS", 3_000)
    monkeypatch.setattr(meter, "MAX_VALUE", 2**16)
    monkeypatch.setattr(meter, "MAX_MADE", 2**18)


@pytest.mark.slow
def test_random_templates_stay_within_the_rules() -> None:
    broken = {seed: problem for seed in range(40) if (problem := broken_rule(make_template(seed))) is not None}
    assert broken == {}


def test_the_seeds_reach_every_kind_of_end() -> None:
    ends = set()
    for seed in range(80):
        try:
            render(make_template(seed), VARIABLES)
            ends.add("rendered")
        except TemplateError as error:
            ends.add("refused" if error.problem.endswith("is not allowed") else error.problem[len("chat template: ") :])
    assert ends >= {"rendered", "refused", "too many steps", "a value grows too large"}


@pytest.mark.parametrize(
    "operation", [operation.strip() for operation in OPERATIONS.replace("\n", ";").split(";")][1:-1]
)
def test_no_operation_goes_uncounted(operation: str) -> None:
    """In a long loop each operator, filter and method runs out of steps or memory before the loop's own end."""
    loop = "{% for i in range(99999) %}{% set x = OPERATION %}{% endfor %}".replace("OPERATION", operation)
    with pytest.raises(TemplateError, match=r"too many steps|too much memory"):
        render("{% set t = 'ab ' * 333 %}{% set l = [t] * 9 %}" + loop, {})
