"""The way to models: the types of a chat, the catalogue, the embedded server and the gateway."""
