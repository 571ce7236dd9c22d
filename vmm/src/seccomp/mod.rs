//! System call filters, one per kind of thread.
