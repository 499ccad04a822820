"""The clients of model servers: ``base`` holds the contract, each other module one way to speak."""
