"""The ASGI layers around the routes: authentication, limits, deadlines, and the access and audit logs."""
