"""Everything that puts the other packages on machines: the `recforge` command and the check of an installation."""

__version__ = "0.1.0"
