"""What the requests of APIs beside OpenAI's first two share: each asks what a chat asks, in words of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import ValidationError

from pymllm.engine.sampling import BLOCK_SETTINGS
from pymllm.errors import RequestError
from pymllm.server.protocol.base import MAX_SHOWN, BodyRequest, StrictModel, read_request, refuse
from pymllm.server.protocol.chat import ChatRequest
from pymllm.server.protocol.neutral import GENERATING, Neutral

P = TypeVar("P", bound=StrictModel)

# A chat's parameter that says how much the model is to think.
EFFORT = "reasoning_effort"

# A chat's parameters that these APIs do not have, and that are taken all the same.
PASSED_ON = (
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "bad_words",
    "logit_bias",
    "guided_json",
    "guided_regex",
    "guided_grammar",
    "guided_choice",
    "structured_outputs",
    "chat_template_kwargs",
    "request_id",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "cache_prompt",
    "priority",
    *BLOCK_SETTINGS,
)


class ConversationRequest(BodyRequest):
    """A conversation that is to be answered.

    SPELLED: what this API calls a chat's parameters, where it has other names for them.
    USUAL_EFFORT: the effort of thinking that this API's default is; it asks for nothing.
    further: a chat's parameters that are passed on as they are.
    """

    NEUTRAL: ClassVar[Neutral] = {
        name: values for name, values in GENERATING.items() if name not in PASSED_ON
    }
    SPELLED: ClassVar[Mapping[str, str]] = {}
    USUAL_EFFORT: ClassVar[str] = "medium"

    model: str | None = None
    stream: bool = False
    temperature: Any = None
    top_p: Any = None
    further: dict[str, Any] = {}

    @classmethod
    def prepare(cls, raw: dict[str, Any]) -> dict[str, Any]:
        if "further" in raw:
            refuse("further", "is not supported by this server", code="unsupported_parameter")
        own = {
            name: value for name, value in raw.items() if name not in PASSED_ON or name in cls.model_fields
        }
        return {**own, "further": {name: value for name, value in raw.items() if name not in own}}

    def messages_of_chat(self) -> list[dict[str, Any]]:
        """Return the conversation as a chat's messages."""
        raise NotImplementedError

    def parameters_of_chat(self) -> dict[str, Any]:
        """Return what else is asked, as a chat's parameters; null asks for nothing."""
        raise NotImplementedError

    @property
    def wants_thoughts(self) -> bool | None:
        """Tell whether the model is to think before it answers; None: as its template has it."""
        return None

    def as_chat(self, variables: Sequence[str] = ()) -> ChatRequest:
        """Return the chat that asks the same.  RequestError, in this API's words, if there is none.

        variables: those about thinking that the chat template reads, one that turns it on and off first.
        """
        shared = {"model": self.model, "temperature": self.temperature, "top_p": self.top_p}
        own = drop_nulls({**shared, **self.parameters_of_chat(), "messages": self.messages_of_chat()})
        for name in self.further.keys() & own.keys():
            refuse(name, f"and {self.SPELLED.get(name, name)} ask for the same: send one of them")
        switch = next((name for name in variables if name != EFFORT), None)
        if EFFORT not in variables and own.get(EFFORT) == self.USUAL_EFFORT:
            del own[EFFORT]
        if switch is not None and self.wants_thoughts is not None:
            own["chat_template_kwargs"] = {
                switch: self.wants_thoughts,
                **(self.further.get("chat_template_kwargs") or {}),
            }
        try:
            return read_request(ChatRequest, {**self.further, **own})
        except RequestError as error:
            raise self.blame(error) from None

    def blame(self, error: RequestError) -> RequestError:
        """Name the parameter in an error as this API spells it.  Returns the error."""
        own = self.SPELLED.get(error.tensor or "")
        if own is not None and error.tensor is not None and error.tensor not in self.further:
            if error.message.startswith(error.tensor):
                error.message = own + error.message.removeprefix(error.tensor)
            error.tensor = own
        return error


def drop_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is null: clients send back objects with null for what an answer did not have."""
    return {name: one for name, one in value.items() if one is not None}


def read_part(kinds: Mapping[str, type[P]], value: Any, param: str, place: str) -> P:
    """Read an object of a list, whose `type` tells its kind.  RequestError, with its place, if it is none of them."""
    if not isinstance(value, Mapping):
        refuse(param, f"must have objects alone (at {place})")
    value = drop_nulls(value)
    name = value.get("type")
    if not isinstance(name, str):
        refuse(param, f"must have objects with a type (at {place})")
    if name not in kinds:
        known = ", ".join(kinds)
        refuse(
            param,
            f"may have objects of the types {known}: {name[:80]!r} (at {place}) is not supported by this server",
            code="unsupported_parameter" if param.startswith("tool") else "unsupported_content",
        )
    return read_object(kinds[name], value, param, place)


def read_object(kind: type[P], value: Any, param: str, place: str) -> P:
    """Read an object of this kind.  RequestError, with the place of what is wrong, if it is none."""
    try:
        return kind.model_validate(drop_nulls(value) if isinstance(value, Mapping) else value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join((place, *map(str, first["loc"]))) if place else ".".join(map(str, first["loc"]))
        where = where[:MAX_SHOWN]
        if first["type"] == "extra_forbidden":
            refuse(param, f"has {where}, which is not supported by this server", code="unsupported_parameter")
        refuse(param, f"is not understood: {first['msg'][0].lower()}{first['msg'][1:]} (at {where})")


def join_parts(texts: list[str]) -> str | list[dict[str, Any]]:
    """Return the content of a chat's message that has these texts: a text, or a part each where there are several."""
    return [{"type": "text", "text": text} for text in texts] if len(texts) > 1 else "".join(texts)
