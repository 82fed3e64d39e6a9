"""The limits of a server, typed and checked. Knows no engine and no HTTP."""

from __future__ import annotations

from pydantic import Field, model_validator

from ptune.config.settings import Settings


class ServeSettings(Settings):
    """What a server allows."""

    max_body: int = Field(1_000_000, gt=0, description="Bytes of a request's body.")
    max_items: int = Field(128, gt=0, description="Texts of one request.")
    max_tokens: int = Field(1024, gt=0, description="Most new tokens of an answer.")
    max_batch: int = Field(32, gt=0, description="Rows that the model reads at once.")
    max_queue: int = Field(256, gt=0, description="Texts that wait; beyond it a request gets 429.")
    gather_seconds: float = Field(0.002, ge=0, description="How long an idle engine waits for company to a request.")
    deadline_seconds: float = Field(120.0, gt=0, description="After so long a request gets 504 and its work stops.")
    prompt_memory: int = Field(1_000_000_000, gt=0, description="Bytes of soft prompts kept in memory.")
    key_memory: int = Field(1_000_000_000, ge=0, description="Bytes of their keys and values kept from call to call.")
    watch_seconds: float = Field(2.0, gt=0, description="How often the folder of soft prompts is looked at.")
    log_text: bool = Field(False, description="Write users' texts and the answers into the log.")

    @model_validator(mode="after")
    def _a_whole_request_fits_the_queue(self) -> ServeSettings:
        if self.max_items > self.max_queue:
            raise ValueError(
                f"a request may have {self.max_items} texts and {self.max_queue} may wait, so a full request would "
                "never be taken; raise max_queue or lower max_items"
            )
        return self


class GatewaySettings(Settings):
    """What a gateway allows."""

    max_body: int = Field(1_000_000, gt=0, description="Bytes of a request's body.")
    max_items: int = Field(128, gt=0, description="Texts of one request.")
    max_tokens: int = Field(1024, gt=0, description="Most new tokens of an answer.")
    max_queue: int = Field(1024, gt=0, description="Requests in flight; beyond it a request gets 429.")
    deadline_seconds: float = Field(120.0, gt=0, description="After so long a request gets 504.")
    watch_seconds: float = Field(2.0, gt=0, description="How often the servers behind it are looked at.")
