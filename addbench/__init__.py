"""The front door: `addbench VERB`, and what a notebook imports."""
