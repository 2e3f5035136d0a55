"""The one error of this package."""


class KernelError(ValueError):
    """What a kernel cannot take: one line that names the tensor or option, and the remedy."""
