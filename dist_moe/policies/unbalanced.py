"""No balancing: the load is measured, and no bias is changed."""

from typing import Literal

from pydantic import Field

from dist_moe.policies.base import Policy


class Unbalanced(Policy):
    """The load is measured and reported, and nothing is done about it."""

    policy: Literal["none"] = Field(default="none", description="no balancing")
