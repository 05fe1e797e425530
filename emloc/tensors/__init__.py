"""Mathematics and layers. Knows no file, no setting and no device."""
