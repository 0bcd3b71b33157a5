"""Tables: the cells that one needs, how far they are, what is left to pay."""
