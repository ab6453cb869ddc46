"""How the bundled models were made: network, trainer and offline decoder. Not part of the installed package."""
