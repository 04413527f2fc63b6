"""The check of annotations that the tests lay over every function of the package."""

from beartype import BeartypeConf, beartype

typed = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float too, as in PEP 484
