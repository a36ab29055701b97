"""LoRAs: attached to a network, read from files, exported."""
