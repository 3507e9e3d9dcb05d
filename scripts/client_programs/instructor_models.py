"""Instructor: pydantic models out of replies, by calls, by JSON and by JSON Schema, whole and as they grow."""

from __future__ import annotations

import sys

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field

QUESTION = [{"role": "user", "content": "How many r's in strawberry?"}]


class Count(BaseModel):
    """How often a letter occurs."""

    letter: str = Field(max_length=1)
    count: int = Field(ge=0, le=99)


def main() -> None:
    url, model = sys.argv[1:]
    for mode in (
        instructor.Mode.TOOLS,
        instructor.Mode.JSON_SCHEMA,
        instructor.Mode.TOOLS_STRICT,
    ):
        client = instructor.from_openai(OpenAI(base_url=url, api_key="EMPTY", max_retries=0), mode=mode)
        asked = {"model": model, "messages": QUESTION, "temperature": 0, "max_retries": 0}
        assert isinstance(client.chat.completions.create(response_model=Count, **asked), Count)
        print(mode.value, flush=True)
    client = instructor.from_openai(OpenAI(base_url=url, api_key="EMPTY"), mode=instructor.Mode.JSON_SCHEMA)
    *_, last = client.chat.completions.create_partial(response_model=Count, model=model, messages=QUESTION)
    Count.model_validate(last.model_dump())
    print("partial", flush=True)


main()
