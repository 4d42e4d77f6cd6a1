"""The section `balance`: the fields of the policy that it names."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Discriminator, Tag
from pydantic.fields import FieldInfo

from dist_moe.policies.base import Policy
from dist_moe.policies.registry import DEFAULT, POLICIES


def policy_name(value: Any) -> str | None:
    """The name of the policy of a section that is not validated yet; the default where it names none."""
    if isinstance(value, Policy):
        return value.policy
    name = value.get("policy", DEFAULT.name()) if isinstance(value, Mapping) else None
    return name if isinstance(name, str) else None


if TYPE_CHECKING:
    BalanceConfig = Policy
else:
    # A union by `policy`, so that a field of another policy is an unknown key. It is built from the registry.
    BalanceConfig = Annotated[
        Union[tuple(Annotated[policy, Tag(name)] for name, policy in POLICIES.items())],  # noqa: UP007
        Discriminator(policy_name),
    ]


def balance_fields() -> dict[str, FieldInfo]:
    """The fields of all policies by name; `policy` describes each of them."""
    fields = {name: field for policy in POLICIES.values() for name, field in policy.model_fields.items()}
    names = [f"{name} ({policy.model_fields['policy'].description})" for name, policy in POLICIES.items()]
    return fields | {
        "policy": FieldInfo(annotation=str, default=DEFAULT.name(), description=f"the policy: {', '.join(names)}")
    }
