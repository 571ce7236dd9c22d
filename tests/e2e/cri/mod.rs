//! Kubernetes pods: containerd's CRI plugin, called as a kubelet calls it.

mod client;
mod forward;
pub mod huge_pages;
mod network;
mod pods;
mod sandboxes;
mod storage;
mod streams;
