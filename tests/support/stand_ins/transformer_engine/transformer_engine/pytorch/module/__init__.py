"""One file a layer, as in the real package."""
