"""What every client is asked to do: objects small enough that the shipped model, held to their schema, ends them."""

from __future__ import annotations

from enum import Enum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

# Tokens for an answer that is held to a schema: a model of this size likes to indent.
LONG = 600
QUESTION = "Write a function `is_even`: Return whether a number is even."


class Closed(BaseModel):
    """An object with no fields but its own, which strict schemas ask for; else a model may add some without an end."""

    model_config = ConfigDict(extra="forbid")


class Colour(str, Enum):
    red = "red"
    green = "green"


class Point(Closed):
    x: int = Field(ge=0, le=9)
    y: int = Field(ge=0, le=9)


class Shape(Closed):
    """A schema with what clients make of pydantic's models: $defs, an enum, a constant, an object in it, null."""

    kind: Literal["line", "dot"]
    colour: Colour
    centre: Point
    end: Point | None
    closed: bool


class Weather(Closed):
    """Return the weather of a city."""

    city: Literal["Oslo", "Lima"]
    days: int = Field(ge=1, le=7)


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Return the weather of a city.",
        "parameters": Weather.model_json_schema(),
    },
}
