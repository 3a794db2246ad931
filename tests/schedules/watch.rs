//! The part of `tokio::sync::watch` that flights use, on shuttle's primitives: a value that is replaced, and borrowed
//! while nobody can replace it.

use std::sync::PoisonError;

use shuttle::sync::{Arc, Condvar, Mutex, RwLock, RwLockReadGuard};

struct Shared<T> {
    value: RwLock<T>,
    replaced: (Mutex<u64>, Condvar),
}

pub struct Sender<T>(Arc<Shared<T>>);
pub struct Receiver<T>(Arc<Shared<T>>);

pub fn channel<T>(value: T) -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared { value: RwLock::new(value), replaced: Default::default() });
    (Sender(shared.clone()), Receiver(shared))
}

impl<T> Sender<T> {
    pub fn subscribe(&self) -> Receiver<T> {
        Receiver(self.0.clone())
    }

    pub fn send_replace(&self, value: T) -> T {
        let mut place = self.0.value.write().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *place, value);
        drop(place);
        *self.0.replaced.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.replaced.1.notify_all();
        before
    }
}

impl<T> Receiver<T> {
    pub fn borrow(&self) -> RwLockReadGuard<'_, T> {
        self.0.value.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a value that `is_right` accepts, and copies it. (tokio's is a future.)
    pub fn wait_for(&self, is_right: impl Fn(&T) -> bool) -> T
    where
        T: Clone,
    {
        let (count, changed) = &self.0.replaced;
        let mut seen = count.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let now = *seen;
            drop(seen);
            let value = self.borrow();
            if is_right(&value) {
                return value.clone();
            }
            drop(value);
            seen = count.lock().unwrap_or_else(PoisonError::into_inner);
            while *seen == now {
                seen = changed.wait(seen).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl<T> std::fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sender")
    }
}
