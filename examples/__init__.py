"""Scripts that run from a checkout of the repository; none is part of the installed package."""
