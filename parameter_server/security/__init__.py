"""Who may talk to whom: certificates, tokens, and why a server does not answer."""
