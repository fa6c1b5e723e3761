"""Programs around a run; nothing of training imports them."""
