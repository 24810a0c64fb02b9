"""Schemas as openai's client makes them of pydantic models: each compiles, and lets the model's own JSON through."""

from __future__ import annotations

import datetime
import enum
import uuid
from decimal import Decimal
from typing import Annotated, Literal, Optional, Union

import openai
import pytest
from pydantic import BaseModel, Field

from pymllm.text.grammars import Grammar


class Colour(enum.Enum):
    red = "red"
    green = "green"


class Level(enum.IntEnum):
    low = 1
    high = 2


class Inner(BaseModel):
    value: int = Field(description="a number")
    colour: Colour


class Tree(BaseModel):
    name: str
    children: list[Tree]


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    good: bool


class Nested(BaseModel):
    inner: Inner
    again: Inner = Field(description="of the same kind")
    several: list[Inner]


class Maybe(BaseModel):
    text: str | None
    number: Optional[int] = None  # noqa: UP045 the older spelling is meant
    inner: Inner | None
    either: Union[int, str, None]  # noqa: UP007


class Choices(BaseModel):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    pets: list[Cat | Dog]
    level: Level
    one: Literal["a", 1, True]


class Bounded(BaseModel):
    number: int = Field(ge=-3, lt=100)
    even: int = Field(multiple_of=2)
    share: float = Field(gt=0, le=1)
    code: str = Field(pattern=r"^[A-Z]{2}-\d+$")
    short: str = Field(min_length=1, max_length=5)
    few: list[int] = Field(min_length=1, max_length=3)


class Formats(BaseModel):
    day: datetime.date
    moment: datetime.datetime
    hour: datetime.time
    span: datetime.timedelta
    id: uuid.UUID
    price: Decimal


class Renamed(BaseModel):
    kind: str = Field(alias="type")
    class_: int = Field(alias="class")
    pair: tuple[int, str]


DAY = datetime.date(2024, 2, 29)
INNER = Inner(value=-5, colour=Colour.red)
INSTANCES = [
    Nested(inner=INNER, again=INNER, several=[INNER, INNER]),
    Tree(name='a "b"\n', children=[Tree(name="", children=[]), Tree(name="ü", children=[])]),
    Maybe(text=None, number=None, inner=None, either=None),
    Maybe(text="x", number=3, inner=INNER, either="y"),
    Choices(pet=Dog(kind="dog", good=True), pets=[Cat(kind="cat", lives=9)], level=Level.high, one=1),
    Bounded(number=99, even=4, share=0.5, code="AB-12", short="abc", few=[1, 2]),
    Formats(
        day=DAY,
        moment=datetime.datetime(2024, 2, 29, 12, 30, 1, tzinfo=datetime.timezone.utc),
        hour=datetime.time(12, 30, 1, tzinfo=datetime.timezone.utc),
        span=datetime.timedelta(days=1, hours=2),
        id=uuid.UUID(int=5, version=4),
        price=Decimal("1.50"),
    ),
    Renamed(**{"type": "t", "class": 1, "pair": (1, "a")}),
]


def follows(llm, schema, text):
    """Tell whether the grammar of a schema lets a text through, token by token, to its end."""
    matcher = llm.grammars.start(Grammar.of_schema(schema))
    for token in llm.tokenizer.encode(text, add_special_tokens=False):
        if not matcher.allowed()[token]:
            return False
        matcher.accept(token)
    return bool(matcher.allowed()[2])  # the shipped model's end token


@pytest.mark.parametrize("instance", INSTANCES, ids=lambda one: type(one).__name__)
def test_a_strict_schema_of_a_model_lets_its_json_through(llm, instance):
    schema = openai.pydantic_function_tool(type(instance))["function"]["parameters"]
    assert schema["additionalProperties"] is False
    text = instance.model_dump_json(by_alias=True)
    assert follows(llm, schema, text)
    assert not follows(llm, schema, text[:-1] + ',"more":1}')
    assert not follows(llm, schema, "{}")
    # As instructor and langchain send it: not strict.
    assert follows(llm, type(instance).model_json_schema(by_alias=True), text)
