"""What a user can cause and mend."""


class InputError(ValueError):
    """Wrong config or input. The process ends with code 2."""
