"""Views of histories, drawn anew each time a sample is read: crops, masks, orders, and what else one adds."""
