"""A template and its variables → text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jinja2

from mlxqwen.errors import TemplateError
from mlxqwen.text.sandbox.environment import RefusedAttributeError, make_environment
from mlxqwen.text.sandbox.literals import LiteralReplacer
from mlxqwen.text.sandbox.meter import Meter, MeteredContext, forbidden, too_expensive, weigh
from mlxqwen.text.sandbox.syntax import MeterInserter

MAX_SOURCE_CHARACTERS = 128 * 1024


@lru_cache(maxsize=16)
def compile_template(source: str, replacements: tuple[tuple[str, str], ...] = ()) -> jinja2.Template:
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise too_expensive(f"found {len(source)} characters, expected at most {MAX_SOURCE_CHARACTERS}")
    environment = make_environment()
    tree = MeterInserter().visit(environment.parse(source))
    if replacements:
        LiteralReplacer(dict(replacements)).visit(tree)
    tree.set_environment(environment)
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.globals)


def render(source: str, variables: Mapping[str, Any], *, replacements: Mapping[str, str] | None = None) -> str:
    """Render a template.

    Args:
        source: the template.
        variables: plain JSON values by name; the template cannot change them.
        replacements: texts in the template's own literals → what stands in their place; variables are left alone.

    Raises:
        TemplateError: the template is broken, forbidden, too expensive, or raises an exception of its own.
    """
    try:
        template = compile_template(source, tuple((replacements or {}).items()))
        context = template.new_context(dict(variables))
        if not isinstance(context, MeteredContext):
            raise forbidden("a context without a meter")
        context.meter = Meter(sum(weigh(value, 2**62) for value in variables.values()))
        return "".join(template.root_render_func(context))
    except TemplateError:
        raise
    except RefusedAttributeError as error:
        raise forbidden(str(error)) from error
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"chat template: line {error.lineno}: {error.message}") from error
    except Exception as error:
        kind = [] if isinstance(error, jinja2.TemplateError) else [type(error).__name__]
        raise TemplateError(": ".join(["chat template", *kind, str(error) or "failed"])) from error
