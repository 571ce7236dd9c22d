//! Kubernetes pods: containerd's CRI plugin, called as a kubelet calls it.

mod client;
mod forward;
mod network;
mod pods;
mod sandboxes;
mod storage;
mod streams;
