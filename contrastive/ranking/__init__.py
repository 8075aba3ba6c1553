"""How recommenders of sequences are judged, and what they recommend: ranks among all items, and the items' space."""
