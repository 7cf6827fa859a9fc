"""Commands; nothing above imports them."""
