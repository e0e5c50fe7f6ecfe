//! The kernel as a witness of what happened to devices and vCPUs.
