"""OpenAI's requests, as pydantic checks them and the OpenAPI document shows them. Fields not named here are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

__all__ = ["ChatRequest", "CompletionRequest"]

Penalty = Field(0.0, ge=-2, le=2)


class Function(BaseModel):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    type: Literal["function"] = "function"
    function: Function


class NamedFunction(BaseModel):
    name: str


class NamedTool(BaseModel):
    type: Literal["function"] = "function"
    function: NamedFunction


class TextPart(BaseModel):
    type: Literal["text", "refusal"] = "text"
    text: str = ""


class CalledFunction(BaseModel):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(BaseModel):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class JsonSchema(BaseModel):
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    type: Literal["text", "json_object", "json_schema", "regex", "grammar", "choice"] = "text"
    json_schema: JsonSchema | None = None
    regex: str | None = Field(None, description="With type regex.")
    grammar: str | None = Field(None, description="With type grammar: Lark as llguidance reads it, or GBNF.")
    choice: list[str] | None = Field(None, description="With type choice: one of these texts.")


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class Common(BaseModel):
    """What chat and completions share."""

    model: str | None = Field(None, max_length=300)
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(1.0, ge=0, le=100)
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(0, ge=-1, le=2**31)
    min_p: float | None = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=100)
    frequency_penalty: float | None = Penalty
    presence_penalty: float | None = Penalty
    logit_bias: dict[str, Annotated[float, Field(ge=-1000, le=1000)]] | None = Field(None, max_length=1000)
    seed: int | None = Field(None, description="Fixes the output; negative numbers count as their absolute value.")
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(1, ge=1, le=16)
    user: str | None = None
    ignore_eos: bool | None = False
    timeout: float | None = Field(None, gt=0, description="Seconds after which the output is cut.")
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class ChatRequest(Common):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = Field(False, description="The last message is the beginning of the answer.")


class CompletionRequest(Common):
    """POST /v1/completions"""

    prompt: str | list[str] | list[int] | list[list[int]] = ""
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = False
    suffix: str | None = None
