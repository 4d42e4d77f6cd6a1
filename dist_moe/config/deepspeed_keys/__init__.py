"""Every key of DeepSpeed's JSON: the field here that sets it, the values that are allowed, or why it is refused."""
