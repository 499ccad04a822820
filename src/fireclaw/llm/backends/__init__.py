"""Where models run: ``base`` holds the contract, each other module one kind of place."""
